// The image: from a file, from the clipboard, or drawn as a sample.

import { $ } from "./dom.js";
import { megabytes } from "./messages.js";
import { showProblem, showStatus } from "./notices.js";
import { startOver } from "./regions.js";
import { changed, flush, state } from "./state.js";
import { fit } from "./view.js";

const SENT_AS_THEY_ARE = ["image/jpeg", "image/png", "image/webp"];

/** Shows a file and starts over with it. Returns whether it is an image. */
export async function openImage(file, name) {
  showProblem("");
  try {
    await showPhoto(file);
  } catch {
    showProblem("That file is no picture that this browser can show. Choose a JPEG, PNG or WebP file.");
    return false;
  }
  const photo = $("photo");
  const sent = SENT_AS_THEY_ARE.includes(file.type) ? file : await asPng(photo);
  state.asking?.abort();
  state.image = {
    file: sent,
    isConverted: sent !== file,
    name: name || "picture",
    width: photo.naturalWidth,
    height: photo.naturalHeight,
    handle: null,
  };
  Object.assign(state, { drag: null, last: null });
  startOver();
  showStatus("");
  $("viewport").style.setProperty("--ratio", String(photo.naturalWidth / photo.naturalHeight));
  photo.alt = name ? `Your picture, ${name}` : "Your picture";
  for (const id of ["viewport", "tools", "under"]) $(id).hidden = false;
  $("empty").hidden = true;
  fit();
  changed("regions", "words");
  flush();
  warnOfLimits();
  return true;
}

function warnOfLimits() {
  const { limits, image } = state;
  if (!limits) return;
  const pixels = image.width * image.height;
  if (image.file.size > limits.max_image_bytes) {
    showProblem(`That picture has ${megabytes(image.file.size)}, and this server takes ${megabytes(limits.max_image_bytes)}. Scale it down first.`);
  } else if (pixels > limits.max_image_pixels) {
    const [has, takes] = [pixels, limits.max_image_pixels].map((count) => Math.round(count / 1e6));
    showProblem(`That picture has ${has} million pixels, and this server takes ${takes} million. Scale it down first.`);
  }
}

function showPhoto(file) {
  const photo = $("photo");
  const url = URL.createObjectURL(file);
  return new Promise((resolve, reject) => {
    const probe = new Image();
    probe.onload = async () => {
      if (photo.src) URL.revokeObjectURL(photo.src);
      photo.src = url;
      await photo.decode();
      resolve();
    };
    probe.onerror = () => {
      URL.revokeObjectURL(url);
      reject(new Error("no picture"));
    };
    probe.src = url;
  });
}

/** What the browser shows, as a file that the server reads the same way. */
export function asPng(photo) {
  const canvas = document.createElement("canvas");
  canvas.width = photo.naturalWidth;
  canvas.height = photo.naturalHeight;
  canvas.getContext("2d").drawImage(photo, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

function imageIn(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/")) ?? transfer?.files?.[0] ?? null;
}

export function listenForImages() {
  const frame = $("frame");
  for (const id of ["choose", "change"]) $(id).addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", ({ target }) => {
    if (target.files[0]) openImage(target.files[0], target.files[0].name);
    target.value = "";
  });
  document.addEventListener("paste", (event) => {
    const file = imageIn(event.clipboardData);
    if (!file) return;
    event.preventDefault();
    openImage(file, file.name);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    frame.classList.add("is-target");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget ?? frame.classList.remove("is-target"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    frame.classList.remove("is-target");
    const file = imageIn(event.dataTransfer);
    if (file) openImage(file, file.name);
  });
}
