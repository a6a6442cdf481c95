// Where the page tells what it does and what went wrong.

import { $, isCalm, setText } from "./dom.js";

export function showProblem(text) {
  $("problem").textContent = text;
  if (!text) return;
  setText($("status"), "");
  $("problem").scrollIntoView({ block: "nearest", behavior: isCalm() ? "auto" : "smooth" });
}

export const showStatus = (text) => setText($("status"), text);
export const showHint = (text) => setText($("hint"), text);
