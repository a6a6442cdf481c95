// Taking results along: the answer as JSON, the image with its regions as PNG, the question as code.

import { hasToken } from "./api.js";
import { $ } from "./dom.js";
import { boundsOf } from "./geometry.js";
import { strokeOutline } from "./masks.js";
import { percent } from "./messages.js";
import { showStatus } from "./notices.js";
import { question } from "./question.js";
import { answerOf, colourOf, state } from "./state.js";
import { choice, keyOf } from "./vocabulary.js";

const LONGEST = 4096; // side of the overlay, in pixels
const TIMEOUT_S = 60;

function save(blob, suffix) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${state.image.name.replace(/\.[^.]*$/, "")}${suffix}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function saveJson() {
  if (state.last) save(new Blob([JSON.stringify(state.last.answer, null, 2)], { type: "application/json" }), ".regions.json");
}

async function savePng() {
  if (!state.image) return;
  const blob = await new Promise((resolve) => paintOverlay().toBlob(resolve, "image/png"));
  save(blob, ".regions.png");
}

/** The image with all regions, their masks and their names. */
export function paintOverlay() {
  const { width, height } = state.image;
  const factor = Math.min(1, LONGEST / Math.max(width, height));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height].map((side) => Math.max(Math.round(side * factor), 1));
  const paint = canvas.getContext("2d");
  paint.scale(canvas.width / width, canvas.height / height);
  paint.drawImage($("photo"), 0, 0, width, height);
  const unit = Math.max(width, height) / 1000; // of lines and letters
  state.regions.forEach((region) => paintRegion(paint, region, unit));
  state.regions.forEach((region, index) => paintName(paint, region, index + 1, unit));
  return canvas;
}

function paintRegion(paint, region, unit) {
  const outline = answerOf(region)?.outline;
  if (outline) strokeOutline(paint, outline, colourOf(region), unit);
  const path = new Path2D();
  if (region.kind === "box") path.rect(region.at[0], region.at[1], region.at[2] - region.at[0], region.at[3] - region.at[1]);
  for (const [x, y] of region.kind === "point" ? region.at : []) {
    path.moveTo(x + 7 * unit, y);
    path.arc(x, y, 7 * unit, 0, 7);
  }
  strokeOutline(paint, { path }, colourOf(region), unit);
}

function paintName(paint, region, number, unit) {
  const answer = answerOf(region);
  const isNamed = answer && answer.found.score >= state.threshold && answer.words === keyOf(choice());
  const text = isNamed ? `${number}  ${answer.found.class}  ${percent(answer.found.score)}` : String(number);
  const [x0, y0] = region.kind === "box" ? region.at : boundsOf(region.at);
  paint.font = `600 ${16 * unit}px system-ui, sans-serif`;
  paint.textBaseline = "middle";
  const [wide, high] = [paint.measureText(text).width + 12 * unit, 24 * unit];
  const x = Math.max(Math.min(x0, state.image.width - wide), 0);
  const y = y0 >= high ? y0 - high : y0;
  paint.fillStyle = colourOf(region);
  paint.fillRect(x, y, wide, high);
  paint.fillStyle = "#101214";
  paint.fillText(text, x + 6 * unit, y + high / 2);
}

// ---------------------------------------------------------------- code

const note = () => (state.image.isConverted ? "# This picture was sent as PNG: convert yours, too.\n" : "");
const address = () => new URL("v1/recognize", location.href).href;
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A command that asks the same. It names the token's variable, never the token. */
export function asCurl() {
  const file = `image=@"${state.image.name.replace(/[\\"]/g, "\\$&")}"`;
  const token = hasToken() ? '  --header "Authorization: Bearer $REGIONSPOT_TOKEN" \\\n' : "";
  return `${note()}curl --fail-with-body ${quoted(address())} \\\n${token}  --form ${quoted(file)} \\\n`
    + `  --form-string ${quoted(`request=${JSON.stringify(question().asked)}`)}\n`;
}

/** A script that asks the same. */
export function asPython() {
  const headers = hasToken() ? `\n        headers={"Authorization": "Bearer " + os.environ["REGIONSPOT_TOKEN"]},` : "";
  const entries = Object.entries(question().asked).map(([key, value]) => `    ${literal(key)}: ${literal(value)},\n`);
  return `${note()}import json\n${hasToken() ? "import os\n" : ""}
import httpx

request = {\n${entries.join("")}}
with open(${literal(state.image.name)}, "rb") as image:
    response = httpx.post(
        ${literal(address())},
        data={"request": json.dumps(request)},
        files={"image": image},${headers}
        timeout=${TIMEOUT_S},
    )
response.raise_for_status()
for region in response.json()["regions"]:
    print(region["class"], region["score"])
`;
}

/** A value of JSON as Python writes it. */
function literal(value) {
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  return JSON.stringify(value);
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    showStatus(`Copied as ${what}.`);
  } catch { // not allowed, or a page without TLS
    $("code-title").textContent = `As ${what}`;
    $("code").value = text;
    $("code-dialog").showModal();
    $("code").select();
  }
}

export function listenForTaking() {
  $("save-json").addEventListener("click", saveJson);
  $("save-png").addEventListener("click", savePng);
  $("copy-curl").addEventListener("click", () => copy(asCurl(), "curl"));
  $("copy-python").addEventListener("click", () => copy(asPython(), "Python"));
  $("code-close").addEventListener("click", () => $("code-dialog").close());
}
