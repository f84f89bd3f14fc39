#!/usr/bin/env bash
# Checks web/*.js against the types that are published of the page, in a temporary folder; needs npm and its registry.
# 1.35.7 is the version next to what ComfyUI 0.8.0 pins (1.35.9); later ones came out without their declarations.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --silent --no-audit --no-fund --no-save typescript@5.9.3
# packed, not installed: its own dependencies are not needed for its declarations
npm pack --silent "@comfyorg/comfyui-frontend-types@${1:-1.35.7}" > /dev/null
mkdir -p types
tar xzf comfyorg-comfyui-frontend-types-*.tgz -C types --strip-components=1
test -s types/index.d.ts || { echo "this version of the types has no declarations in it" >&2; exit 1; }
cat > tsconfig.json <<END
{
  "compilerOptions": {
    "allowJs": true, "checkJs": true, "noEmit": true, "strict": true, "skipLibCheck": true, "types": [],
    "target": "es2022", "module": "es2022", "moduleResolution": "bundler", "lib": ["es2022", "dom", "dom.iterable"],
    "paths": { "@comfyorg/comfyui-frontend-types": ["./types/index.d.ts"] }
  },
  "files": ["$here/page.d.ts"], "include": ["$root/web/*.js"]
}
END
npx tsc -p .
echo "web/*.js fit the page's types"
