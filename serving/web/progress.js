// Where one is: the numbered steps, what comes next, and how an answer stands to what is asked now.

import { $, element, setText } from "./dom.js";
import { many, percent } from "./messages.js";
import { answerOf, byId, colourOf, numberOf, state } from "./state.js";
import { among, choice, keyOf } from "./vocabulary.js";

/** What is missing before anything can be asked, as {step, text, at}: at is where to go for it. */
export function missing() {
  if (!state.image) return { step: 1, text: "Choose a picture first.", at: $("choose") };
  if (!state.regions.length) return { step: 2, text: "Draw a box or click a point first: what should be named?", at: $("add") };
  if (!choice()) return { step: 3, text: "Write a few words to choose from.", at: $("words") };
  return null;
}

export function drawProgress() {
  const next = missing();
  const done = [Boolean(state.image), state.regions.length > 0, Boolean(choice())];
  [...$("steps").children].forEach((step, index) => {
    step.classList.toggle("is-done", done[index]);
    step.classList.toggle("is-current", next?.step === index + 1);
    if (next?.step === index + 1) step.setAttribute("aria-current", "step");
    else step.removeAttribute("aria-current");
    setText(step.querySelector(".unseen"), done[index] ? ", done" : "");
  });
  $("form-fields").disabled = !state.image;
  if (!state.asking) $("ask").setAttribute("aria-disabled", String(next !== null));
  for (const id of ["copy-curl", "copy-python"]) $(id).disabled = next !== null;
  $("take").hidden = next !== null && !state.last;
  drawStanding();
  drawCurrent();
}

/** What the last answer says and what it does not: its words, and what has changed since. */
function drawStanding() {
  const { last } = state;
  for (const id of ["save-json", "save-png"]) $(id).disabled = !last;
  $("threshold-row").hidden = !last;
  setText($("among"), last ? `Percentages are of ${among(last.chosen)} alone.` : "");
  setText($("stale"), last ? changesSince(last).join(" ") : "");
}

function changesSince({ words }) {
  const unknown = state.regions.filter((region) => !answerOf(region));
  const moved = unknown.filter(({ id }) => state.answers.has(id)).length;
  const added = unknown.length - moved;
  const said = [];
  if (words !== keyOf(choice())) said.push("The words changed since this answer.");
  if (moved) said.push(`${many(moved, "region was", "regions were")} moved since.`);
  if (added) said.push(`${many(added, "region is", "regions are")} new.`);
  return said.length ? [...said, "Ask again to name them all."] : said;
}

/** Beside Ask: what is missing, or (where the list is far away) the answer about the selected region. */
export function drawCurrent() {
  const next = missing();
  const node = $("current");
  node.replaceChildren();
  node.disabled = next !== null || !state.regions.length;
  node.classList.toggle("is-next", next !== null);
  node.style.removeProperty("--c");
  if (next) {
    element("span", "", node, next.text);
    return;
  }
  const region = byId(state.selected);
  const named = state.regions.filter((one) => answerOf(one)).length;
  if (!region) {
    element("span", "", node, `${many(state.regions.length, "region")}${named ? `, ${named} named` : ""}`);
    return;
  }
  node.style.setProperty("--c", colourOf(region));
  element("span", "number", node, String(numberOf(region)));
  const answer = answerOf(region);
  const isStale = Boolean(answer) && answer.words !== keyOf(choice());
  element("span", answer && !isStale ? "name" : "name is-open", node, answer ? answer.found.class : "not asked yet");
  if (answer) element("span", "score", node, isStale ? "other words" : percent(answer.found.score));
}
