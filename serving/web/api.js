// The gateway: its addresses, its token, and answers that are what they should be.

import { $ } from "./dom.js";
import { Refusal, refusalOfStatus } from "./messages.js";
import { state } from "./state.js";

export const hasToken = () => Boolean(sessionStorage.getItem("token"));

/** Reads JSON from an address. Raises Refusal, or the AbortError of a request that was taken back. */
export async function call(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Refusal("NETWORK");
  });
  if (response.status === 401 && (await askForToken(Boolean(token)))) return call(path, options);
  const content = await contentOf(response);
  if (response.ok) return content;
  const retryAfter = secondsUntil(response.headers.get("Retry-After"));
  const { code, message = "", request_id: requestId = "" } = content?.error ?? {};
  if (!code) throw refusalOfStatus(response.status, retryAfter);
  throw new Refusal(code, message, { requestId, retryAfter, status: response.status });
}

/** A body's JSON, or null where it is something else and the status says why. */
async function contentOf(response) {
  let text;
  try {
    text = await response.text();
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refusal("CUT_OFF");
  }
  try {
    const content = JSON.parse(text);
    if (content !== null && typeof content === "object") return content;
  } catch {
    // as below
  }
  if (response.ok) throw new Refusal("CUT_OFF");
  return null;
}

/** Of a header Retry-After, which holds seconds or a date. */
function secondsUntil(text) {
  if (!text) return 0;
  const seconds = /^\d+$/.test(text) ? Number(text) : (Date.parse(text) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(Math.ceil(seconds), 0) : 0;
}

function post(question, file, signal) {
  const form = new FormData();
  form.append("request", JSON.stringify(question));
  if (file) form.append("image", file, state.image.name);
  return call("v1/recognize", { method: "POST", body: form, signal });
}

/** Asks with the image's handle where there is one, and with the image where the server has forgotten it. */
export async function recognize(question, image, count, signal) {
  const answer = await withHandle(question, image, signal);
  const isWhole = answer.image && Array.isArray(answer.regions) && answer.regions.length === count;
  if (!isWhole) throw new Refusal("CUT_OFF");
  return answer;
}

async function withHandle(question, image, signal) {
  if (image.handle) {
    try {
      return await post({ ...question, image_handle: image.handle }, null, signal);
    } catch (error) {
      if (error.code !== "IMAGE_UNKNOWN") throw error;
      image.handle = null;
    }
  }
  return post(question, image.file, signal);
}

let tokenAsked = null;

/** Resolves to whether there is a new token to try. */
function askForToken(wasWrong) {
  tokenAsked ??= new Promise((resolve) => {
    const dialog = $("token-dialog");
    $("token-title").textContent = wasWrong ? "That was not the token" : "This server wants a token";
    $("token").value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      const token = dialog.returnValue === "given" ? $("token").value.trim() : "";
      if (token) sessionStorage.setItem("token", token);
      else sessionStorage.removeItem("token");
      tokenAsked = null;
      resolve(token !== "");
    }, { once: true });
    dialog.showModal();
  });
  return tokenAsked;
}

export function listenForToken() {
  $("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    $("token-dialog").close("given");
  });
  $("token-cancel").addEventListener("click", () => $("token-dialog").close());
}
