// The tab's job heartbeat: while a job runs, the page polls its state by clicking a hidden button of the tab, so that
// updates use gradio's own connection. The script also makes the library's cards clickable, and announces changes to
// screen readers.
(function () {
    "use strict";

    const INTERVAL = 800;  // milliseconds between polls
    const TIMEOUT = 15000; // milliseconds after which an unanswered poll is repeated
    let polled = null;     // the beat that the page showed at the last poll; it changes with the answer
    let polledAt = 0;
    let patience = 3 * INTERVAL; // before the first poll of a page is repeated; doubled each time
    let announced = "";

    const find = (selector) => gradioApp().querySelector(selector);

    function press(id) {
        const found = find("#" + id);
        if (!found) return false;
        (found.tagName === "BUTTON" ? found : found.querySelector("button")).click();
        return true;
    }

    function states() {
        return ["forget_concept_state", "forget_concept_evaluate_state"]
            .map((id) => find(`#${id} .fc-state`))
            .filter(Boolean);
    }

    // a persistent live region: screen readers ignore regions that are inserted together with their text
    function liveRegion() {
        let region = document.getElementById("forget_concept_speaker");
        if (!region) {
            region = document.createElement("div");
            region.id = "forget_concept_speaker";
            region.setAttribute("role", "status");
            region.setAttribute("aria-live", "polite");
            document.body.appendChild(region);
        }
        return region;
    }

    function poll() {
        const found = states();
        const now = Date.now();
        // beat 0: this page has no state yet; repeated, because gradio may not be listening at first
        if (found.some((one) => one.dataset.beat === "0")) {
            if (!polledAt || now - polledAt > patience) {
                if (polledAt) patience *= 2;
                polledAt = now;
                press("forget_concept_opened");
            }
            return;
        }
        const active = found.filter((one) => ["queued", "running"].includes(one.dataset.state));
        const words = found.map((one) => one.dataset.say).filter(Boolean).join(" ");
        if (words !== announced) {
            announced = words;
            liveRegion().textContent = words;
        }
        if (!active.length) {
            polled = null;
            return;
        }
        const beat = found.map((one) => one.dataset.beat).join();
        if (beat === polled && now - polledAt < TIMEOUT) return;
        polled = beat;
        polledAt = now;
        press("forget_concept_beat");
    }

    // The badges: what is in the model, on the pages that generate pictures. The tab's hidden element holds it; it is
    // asked for again whenever something has happened that can change it: a page was chosen, pictures were generated,
    // the webui has other options, or another checkpoint is in its menu. That one takes a while to load.
    const LOADING = [1500, 5000, 15000, 40000]; // milliseconds after a change of the menu
    const GALLERIES = ["txt2img", "img2img"];
    let seen = "";

    function happenings() {
        const menu = find("#setting_sd_model_checkpoint input") || find(".model_selection input");
        const drawn = GALLERIES.map((one) => find(`#html_info_${one}`)?.textContent ?? "");
        // the webui's options, which it sends again once a checkpoint is loaded; its event for them fires on any update
        const loaded = typeof opts === "object" && opts ? opts.sd_checkpoint_hash ?? "" : "";
        return { menu: menu ? menu.value : "", loaded, drawn: drawn.join() };
    }

    function glance() {
        press("forget_concept_glance");
    }

    function watch() {
        const now = happenings();
        const key = JSON.stringify(now);
        if (seen && seen !== key) {
            if (JSON.parse(seen).menu !== now.menu) LOADING.forEach((delay) => setTimeout(glance, delay));
            glance();
        }
        seen = key;
        const content = find("#forget_concept_badge .fc-badge-content")?.innerHTML ?? "";
        for (const one of GALLERIES) {
            const place = find(`#${one}_settings`);
            if (!place) continue;
            let badge = document.getElementById(`forget_concept_badge_${one}`);
            if (!badge) {
                badge = document.createElement("div");
                badge.id = `forget_concept_badge_${one}`;
                badge.className = "fc-badge";
                badge.setAttribute("role", "status");
                place.prepend(badge);
            }
            if (badge.dataset.content === content) continue;
            badge.dataset.content = content;
            badge.innerHTML = content;
        }
    }

    // gradio reacts to input events, not to values
    function write(id, text) {
        const area = find(`#${id} textarea, #${id} input`);
        if (!area) return;
        area.value = text;
        area.dispatchEvent(new Event("input", { bubbles: true }));
    }

    function choose(event) {
        const button = event.target.closest && event.target.closest("[data-press]");
        if (button) {
            button.disabled = true;
            press(button.dataset.press);
            setTimeout(() => { button.disabled = false; }, 3 * INTERVAL);
            return;
        }
        const card = event.target.closest && event.target.closest("#forget_concept_cards button.fc-card");
        if (!card) return;
        write("forget_concept_pressed", card.dataset.name);
        setTimeout(() => press("forget_concept_press"), 50);
    }

    function makeButton(part, name) {
        part.setAttribute("role", "button");
        part.setAttribute("tabindex", "0");
        if (name) part.setAttribute("aria-label", name);
        part.addEventListener("keydown", (event) => {
            if (event.target !== part || !["Enter", " "].includes(event.key)) return;
            event.preventDefault();
            part.click();
        });
    }

    // Accessibility fixes: gradio does not label a slider's number field, gives the label of a text with a copy button
    // to the button, and gradio 3 makes accordions and file inputs unreachable by keyboard. Runs repeatedly, because
    // gradio recreates elements.
    function fixAccessibility() {
        const tab = find("#tab_forget_concept");
        if (!tab.offsetParent) return;
        const nameless = "input[type=number]:not([aria-label]), textarea:disabled:not([aria-label])";
        for (const field of tab.querySelectorAll(nameless)) {
            const label = field.closest(".gradio-slider, .gradio-textbox, .block")?.querySelector("label span, span");
            if (label) field.setAttribute("aria-label", label.textContent.trim());
        }
        for (const input of tab.querySelectorAll("div:not([role]) > input[type=file]")) {
            const label = input.closest(".block")?.querySelector("[data-testid=block-label]");
            makeButton(input.parentElement, label ? label.textContent.trim() : "Choose a file");
        }
        for (const fold of tab.querySelectorAll("div.label-wrap")) {
            if (!fold.hasAttribute("role")) makeButton(fold, "");
            fold.setAttribute("aria-expanded", String(fold.classList.contains("open")));
        }
    }

    onUiLoaded(function () {
        if (!find("#forget_concept_beat")) return;
        gradioApp().addEventListener("click", choose);
        // on the way down: gradio replaces the button of a page as soon as it is clicked, and it is then in no page
        gradioApp().addEventListener("click", (event) => {
            if (event.target.closest && event.target.closest("#tabs > .tab-nav button")) setTimeout(glance, 0);
        }, true);
        setInterval(() => { poll(); watch(); fixAccessibility(); }, INTERVAL);
    });
})();
