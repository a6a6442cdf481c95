// The words to choose from: typed ones, or a vocabulary that the server has.

import { $, element } from "./dom.js";
import { many } from "./messages.js";
import { changed, state } from "./state.js";

const SHOWN = 500; // words of a vocabulary

export function wordsGiven() {
  return [...new Set($("words").value.split(/[,;\n]/).map((word) => word.trim()).filter(Boolean))];
}

/** What is asked for, as the API takes it: {vocabulary} or {words}; null where no word is given. */
export function choice() {
  const vocabulary = $("source").value;
  if (vocabulary) return { vocabulary };
  const words = wordsGiven();
  return words.length ? { words } : null;
}

/** The same text for the same words in any order. */
export const keyOf = (chosen) => JSON.stringify(chosen?.words ? [...chosen.words].sort() : chosen?.vocabulary ?? null);

/** In a sentence: "these 4 words". */
export function among(chosen) {
  if (chosen.words) return chosen.words.length === 1 ? "this 1 word" : `these ${chosen.words.length} words`;
  const known = state.vocabularies.find(({ name }) => name === chosen.vocabulary);
  return known && known.count !== null ? `the ${many(known.count, "word")} of ${known.name}` : `the words of ${chosen.vocabulary}`;
}

/** Takes over what the server says of its vocabularies: their words, how many they are, or names alone. */
export function setVocabularies(told) {
  state.vocabularies = told.map(({ name, words }) => {
    const listed = Array.isArray(words) ? words : null;
    return { name, words: listed, count: listed ? listed.length : Number.isInteger(words) ? words : null };
  });
  const options = state.vocabularies.map(({ name, count }) => (
    new Option(count === null ? name : `${name} (${many(count, "word")})`, name)
  ));
  const chosen = $("source").value;
  $("source").replaceChildren(new Option("My own words", ""), ...options);
  $("source").value = state.vocabularies.some(({ name }) => name === chosen) ? chosen : "";
  showSource();
}

export function showSource() {
  const vocabulary = $("source").value;
  $("words-field").hidden = vocabulary !== "";
  const count = wordsGiven().length;
  $("words-note").textContent = count === 0 ? "Separate them by commas or new lines."
    : count === 1 ? "1 word: every region will be that. Give it some company."
    : `${count} words`;
  showListed(state.vocabularies.find(({ name }) => name === vocabulary)?.words ?? []);
  changed("words");
}

function showListed(words) {
  $("listed").hidden = words.length === 0;
  $("listed-words").replaceChildren();
  for (const word of words.slice(0, SHOWN)) element("li", "", $("listed-words"), word);
  const rest = words.length - SHOWN;
  if (rest > 0) element("li", "muted", $("listed-words"), `and ${rest} more`);
}

export function listenForWords() {
  $("source").addEventListener("change", showSource);
  $("words").addEventListener("input", showSource);
}
