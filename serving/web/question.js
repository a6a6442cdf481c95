// What is asked, the wait for it, and taking over the answer.

import { recognize } from "./api.js";
import { $ } from "./dom.js";
import { asPng } from "./image.js";
import { outlineOf } from "./masks.js";
import { explain, many } from "./messages.js";
import { showProblem, showStatus } from "./notices.js";
import { missing } from "./progress.js";
import { changed, flush, state } from "./state.js";
import { choice, keyOf } from "./vocabulary.js";

const TOP_K = 5;
const SLOW_MS = 1000; // after which the wait is explained
const SLICE_MS = 12; // of work on outlines between two frames
const OUTLINE_CELLS = 32e6; // of the grids that all outlines of an answer are traced on

const learned = new Set(); // words that the server has been asked about
let serial = 0;

/** The question as it stands: what is sent, and the regions in the order of the answers. */
export function question() {
  const chosen = choice();
  const [boxes, points] = ["box", "point"].map((kind) => state.regions.filter((region) => region.kind === kind));
  const asked = { top_k: TOP_K, masks: $("want-masks").checked };
  if (boxes.length) asked.boxes = boxes.map(({ at }) => at);
  if (points.length) Object.assign(asked, clicksOf(points));
  return { asked: { ...asked, ...chosen }, chosen, regions: [...boxes, ...points] };
}

/** Points as the API takes them: as many clicks for each region, so that some repeat their last one. */
function clicksOf(regions) {
  const most = Math.max(...regions.map(({ at }) => at.length));
  const clicks = regions.map(({ at }) => Array.from({ length: most }, (_, index) => at[Math.min(index, at.length - 1)]));
  const labels = clicks.map((row) => row.map(([, , label]) => label));
  if (most === 1 && labels.every(([label]) => label)) return { points: clicks.map(([[x, y]]) => [x, y]) };
  return { points: clicks.map((row) => row.map(([x, y]) => [x, y])), point_labels: labels };
}

export async function ask() {
  if (state.asking) return;
  const lacks = missing();
  showProblem(lacks?.text ?? "");
  if (lacks) {
    lacks.at.focus();
    return;
  }
  const { image } = state;
  const put = question();
  const began = performance.now();
  const asking = new AbortController();
  setAsking(asking);
  const slow = setInterval(() => explainWait(put, performance.now() - began), SLOW_MS);
  try {
    const answer = await answerTo(put, image, asking.signal);
    clearInterval(slow);
    if (state.image === image) takeOver(answer, put, performance.now() - began);
  } catch (error) {
    clearInterval(slow);
    if (error.name === "AbortError") showStatus(state.image === image ? "Cancelled." : "");
    else showProblem(explain(error));
  } finally {
    setAsking(null);
  }
}

/** The answer about the image as the browser shows it: should the server see another size, it is sent what we see. */
async function answerTo({ asked, regions }, image, signal) {
  const answer = await recognize(asked, image, regions.length, signal);
  if (answer.image.width === image.width && answer.image.height === image.height) return answer;
  Object.assign(image, { handle: null, file: await asPng($("photo")), isConverted: true });
  return recognize(asked, image, regions.length, signal);
}

function setAsking(controller) {
  state.asking = controller;
  const isAsking = controller !== null;
  $("ask").disabled = isAsking;
  $("ask-text").textContent = isAsking ? "Asking…" : "Ask";
  $("cancel").hidden = !isAsking;
  $("elapsed").textContent = "";
  document.body.classList.toggle("is-busy", isAsking);
  $("question").setAttribute("aria-busy", String(isAsking));
  if (isAsking) showStatus("");
  changed("words");
}

function explainWait({ chosen }, waited) {
  const fresh = (chosen.words ?? []).filter((word) => !learned.has(word)).length;
  showStatus(fresh ? `The server is learning ${many(fresh, "new word")}. It does that once for each.` : "The server is still working on it.");
  $("elapsed").textContent = `${Math.round(waited / 1000)} s`;
}

function takeOver(answer, { asked, chosen, regions }, took) {
  state.image.handle = answer.image_handle;
  for (const word of chosen.words ?? []) learned.add(word);
  const words = keyOf(chosen);
  regions.forEach((region, index) => {
    serial += 1;
    state.answers.set(region.id, { at: region.at, words, found: answer.regions[index], outline: null, serial });
  });
  state.last = { asked, answer, chosen, words };
  changed("regions");
  flush();
  traceOutlines(regions);
  const known = answer.cached ? ", encoders skipped" : "";
  showStatus(`${many(regions.length, "region")} in ${Math.round(took)} ms (server: ${Math.round(answer.took_ms)} ms${known}).`);
}

/** Follows the edges of all masks, a few at a time, on grids whose cells are bounded together. */
async function traceOutlines(regions) {
  const given = regions.map(({ id }) => state.answers.get(id)).filter(({ found }) => found.mask);
  const side = Math.min(1024, Math.floor(Math.sqrt(OUTLINE_CELLS / Math.max(given.length, 1))));
  let began = performance.now();
  for (const answer of given) {
    answer.outline = outlineOf(answer.found.mask, side);
    if (performance.now() - began < SLICE_MS) continue;
    await new Promise((resolve) => setTimeout(resolve));
    began = performance.now();
  }
  changed("masks");
}
