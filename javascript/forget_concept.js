// The tab's heartbeat: while a job is under way the page asks how it stands, through a hidden button of the tab, so
// that every answer takes gradio's own way. It also presses the cards of the library, and says aloud what changes.
(function () {
    "use strict";

    const BETWEEN = 800;  // milliseconds from an answer to the next question
    const LOST = 15000;   // an answer that takes longer is given up
    let asked = null;     // the beat that was answered last when a question went out
    let askedAt = 0;
    let said = "";

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

    // a region that stays: what is put into a page whole is not read out
    function speaker() {
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

    function look() {
        const found = states();
        const now = Date.now();
        // beat 0: this page has not been told anything yet; gradio may not listen at first
        if (found.some((one) => one.dataset.beat === "0")) {
            if (now - askedAt > 3 * BETWEEN) {
                askedAt = now;
                press("forget_concept_opened");
            }
            return;
        }
        const under = found.filter((one) => ["queued", "running"].includes(one.dataset.state));
        const words = found.map((one) => one.dataset.say).filter(Boolean).join(" ");
        if (words !== said) {
            said = words;
            speaker().textContent = words;
        }
        if (!under.length) {
            asked = null;
            return;
        }
        const beat = found.map((one) => one.dataset.beat).join();
        if (beat === asked && now - askedAt < LOST) return;
        asked = beat;
        askedAt = now;
        press("forget_concept_beat");
    }

    // gradio listens to events, not to values
    function write(id, text) {
        const area = find(`#${id} textarea, #${id} input`);
        if (!area) return;
        area.value = text;
        area.dispatchEvent(new Event("input", { bubbles: true }));
    }

    function choose(event) {
        const card = event.target.closest && event.target.closest("#forget_concept_cards .fc-card");
        if (!card) return;
        write("forget_concept_pressed", card.dataset.name);
        setTimeout(() => press("forget_concept_press"), 50);
    }

    function asButton(part, name) {
        part.setAttribute("role", "button");
        part.setAttribute("tabindex", "0");
        if (name) part.setAttribute("aria-label", name);
        part.addEventListener("keydown", (event) => {
            if (event.target !== part || !["Enter", " "].includes(event.key)) return;
            event.preventDefault();
            part.click();
        });
    }

    // in gradio a slider's number has no name of its own, a text with a copy button gives its name to the button, and
    // gradio 3 has no way by keyboard to a fold or a place for files; what it makes anew has to be told again
    function name() {
        const tab = find("#tab_forget_concept");
        if (!tab.offsetParent) return;
        const nameless = "input[type=number]:not([aria-label]), textarea:disabled:not([aria-label])";
        for (const field of tab.querySelectorAll(nameless)) {
            const label = field.closest(".gradio-slider, .gradio-textbox, .block")?.querySelector("label span, span");
            if (label) field.setAttribute("aria-label", label.textContent.trim());
        }
        for (const input of tab.querySelectorAll("div:not([role]) > input[type=file]")) {
            const label = input.closest(".block")?.querySelector("[data-testid=block-label]");
            asButton(input.parentElement, label ? label.textContent.trim() : "Choose a file");
        }
        for (const fold of tab.querySelectorAll("div.label-wrap")) {
            if (!fold.hasAttribute("role")) asButton(fold, "");
            fold.setAttribute("aria-expanded", String(fold.classList.contains("open")));
        }
    }

    onUiLoaded(function () {
        if (!find("#forget_concept_beat")) return;
        gradioApp().addEventListener("click", choose);
        setInterval(() => { look(); name(); }, BETWEEN);
    });
})();
