// Sentences: what is said of errors and numbers.

import { numberOf, state } from "./state.js";

/** An error of a request, with the code that the gateway gave it, or one of the page's own in SAID. */
export class Refusal extends Error {
  constructor(code, message = "", { requestId = "", retryAfter = 0, status = 0 } = {}) {
    super(message);
    Object.assign(this, { code, requestId, retryAfter, status });
  }
}

const SAID = {
  NETWORK: () => "The server behind this page does not answer. Check the connection, then ask again.",
  CUT_OFF: () => "The answer broke off on its way. Ask again.",
  BUSY: ({ retryAfter }) => `Too many requests at the moment. ${again(retryAfter || 5)}`,
  PROXY_TOO_LARGE: () => "A proxy in front of the server refuses a request of this size. Scale the picture down, or ask whoever runs the server.",
  PROXY_DOWN: ({ status, retryAfter }) => `A proxy answered that the server behind it is not there (status ${status}). ${again(retryAfter || 5)}`,
  PROXY: ({ status }) => `Something between this page and the server answered in its place (status ${status}). Whoever runs the server can tell why.`,
  OVERLOADED: ({ retryAfter }) => `The server is busy. ${again(retryAfter || 2)}`,
  UNAVAILABLE: () => "The model server cannot be reached at the moment. It may be starting: ask again in a few seconds.",
  TIMEOUT: () => "No answer came in time. Ask again, or for fewer regions, fewer new words or no masks.",
  INTERNAL: ({ requestId }) => `The server failed. Its log says why${requestId ? `, under request ${requestId}` : ""}.`,
  UNAUTHORIZED: () => "This server wants a token. Ask again to enter it.",
};

/** What an answer without an error code of the gateway means: it came from something in front of it. */
export function refusalOfStatus(status, retryAfter) {
  const code = status === 401 ? "UNAUTHORIZED"
    : status === 413 ? "PROXY_TOO_LARGE"
    : status === 429 ? "BUSY"
    : [502, 503, 504].includes(status) ? "PROXY_DOWN"
    : "PROXY";
  return new Refusal(code, "", { status, retryAfter });
}

export function explain(error) {
  if (!(error instanceof Refusal)) {
    console.error(error);
    return "Something went wrong in this page. Reload it and try again.";
  }
  const said = SAID[error.code]?.(error);
  if (said) return said;
  const told = sentence(withOurNumbers(error.message)) || "The server refused that.";
  return error.retryAfter ? `${told} ${again(error.retryAfter)}` : told;
}

/** The server counts boxes and clicks from 0, apart; the page numbers all of them from 1. */
function withOurNumbers(message) {
  return message.replace(/\b(box|point) (\d+) \[[^\]]*\]/, (whole, kind, index) => {
    const region = state.regions.filter((one) => one.kind === kind)[Number(index)];
    return region ? `Region ${numberOf(region)}` : whole;
  });
}

const again = (count) => `Ask again in ${count === 1 ? "a second" : `${count} seconds`}.`;
const sentence = (text) => (text ? text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".") : "");

export const percent = (score) => (score > 0 && score < 0.005 ? "<1%" : `${Math.round(score * 100)}%`);
export const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MB`;
export const many = (count, one, more = `${one}s`) => `${count} ${count === 1 ? one : more}`;

/** A region in a sentence, for whoever cannot see it. */
export function describe(region, number, answer) {
  const what = answer ? `${answer.found.class}, ${percent(answer.found.score)}` : "not asked yet";
  return `Region ${number}, ${whereIs(region)}: ${what}`;
}

function whereIs({ id, kind, at }) {
  if (kind === "box") {
    const [x0, y0, x1, y1] = at.map(Math.round);
    return `box from ${x0}, ${y0} to ${x1}, ${y1}`;
  }
  const index = state.selected === id ? Math.min(state.click, at.length - 1) : 0;
  const [x, y, label] = at[index];
  const place = `${Math.round(x)}, ${Math.round(y)}`;
  if (at.length === 1) return `point at ${place}`;
  return `${many(at.length, "point")}, point ${index + 1} at ${place}${label ? "" : ", excluded"}`;
}
