// The page: an image, regions drawn on it, a question about them, and the answers. No framework, no build step.
// State is in state.js; everything that changes it calls `changed`, and draw.js brings the page in line.

import { listenForToken } from "./api.js";
import { $, isCalm } from "./dom.js";
import { draw } from "./draw.js";
import { listenForImages } from "./image.js";
import { addInTheMiddle, drawHint, listenForKeys, removeAndGoOn } from "./keyboard.js";
import { itemOf } from "./list.js";
import { listenForPointer } from "./pointer.js";
import { ask } from "./question.js";
import { clearRegions, redo, undo } from "./regions.js";
import { openSample } from "./sample.js";
import { listenForAbout, loadInfo } from "./server.js";
import { changed, onChange, state } from "./state.js";
import { listenForTaking } from "./take.js";
import { listenForZoom } from "./view.js";
import { listenForWords, showSource } from "./vocabulary.js";

function listenForRegions() {
  const clicks = { sample: openSample, add: addInTheMiddle, clear: clearRegions, undo, redo, current: goToAnswer };
  for (const [id, act] of Object.entries(clicks)) $(id).addEventListener("click", act);
  for (const input of document.querySelectorAll('input[name="mode"], input[name="click"]')) {
    input.addEventListener("change", () => changed("states"));
  }
  $("regions").addEventListener("click", ({ target }) => {
    const remove = target.closest(".remove");
    if (remove) removeAndGoOn(Number(remove.closest(".region").dataset.region), true);
  });
  $("threshold").addEventListener("input", ({ target }) => {
    state.threshold = Number(target.value) / 100;
    $("threshold-value").textContent = `${target.value}%`;
    changed("threshold");
  });
}

function listenForQuestion() {
  $("question").addEventListener("submit", (event) => {
    event.preventDefault();
    ask().then(() => $("model").dataset.state !== "up" && state.last && loadInfo());
  });
  $("cancel").addEventListener("click", () => state.asking?.abort());
}

/** From the bar of a small screen to the selected region's whole answer. */
function goToAnswer() {
  const target = itemOf(state.selected)?.item ?? $("answers");
  target.scrollIntoView({ block: "center", behavior: isCalm() ? "auto" : "smooth" });
}

onChange((parts) => {
  draw(parts);
  drawHint();
});
listenForImages();
listenForRegions();
listenForQuestion();
listenForPointer();
listenForKeys();
listenForZoom();
listenForWords();
listenForTaking();
listenForToken();
listenForAbout();
showSource();
loadInfo();
