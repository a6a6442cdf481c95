// What the server says of itself: whether it is there, its vocabularies and limits, and the corner for operators.

import { call } from "./api.js";
import { $, element } from "./dom.js";
import { megabytes } from "./messages.js";
import { changed, state } from "./state.js";
import { setVocabularies } from "./vocabulary.js";

const RETRY_MS = 5000;

export async function loadInfo() {
  try {
    const info = await call("v1/info");
    state.limits = info.limits;
    show("up", "Ready");
    setVocabularies(info.vocabularies);
    showFacts(info);
    changed("words");
  } catch (error) {
    const isLocked = error.code === "UNAUTHORIZED";
    show("down", isLocked ? "A token is needed" : "The model server is not there");
    if (!isLocked) setTimeout(loadInfo, RETRY_MS);
  }
}

function show(up, text) {
  $("model").dataset.state = up;
  $("model-name").textContent = text;
}

function showFacts({ model, runtime, precision, vocabularies, limits }) {
  const facts = {
    Model: model,
    Runtime: `${runtime}, ${precision}`,
    Vocabularies: vocabularies.map(({ name }) => name).join(", ") || "none",
    Picture: `at most ${megabytes(limits.max_image_bytes)} and ${Math.round(limits.max_image_pixels / 1e6)} million pixels`,
    Regions: `at most ${limits.max_regions}`,
    Words: `at most ${limits.max_words}, ${limits.max_new_words} of them new`,
  };
  $("facts").replaceChildren();
  for (const [name, value] of Object.entries(facts)) {
    element("dt", "", $("facts"), name);
    element("dd", "", $("facts"), value);
  }
}

export function listenForAbout() {
  $("about-open").addEventListener("click", () => $("about").showModal());
  $("about-close").addEventListener("click", () => $("about").close());
}
