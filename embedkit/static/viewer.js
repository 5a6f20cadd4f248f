// Owns showing slices: grey previews, heat over them, orientation letters and bars per slice; knows no server.

import { heatTable } from "/static/colours.js";

const LETTERS = { axial: ["R", "L", "A", "P"], coronal: ["R", "L", "S", "I"], sagittal: ["A", "P", "S", "I"] };

/** A canvas of `side` x `side` with one slice of raw grey bytes. */
export function greyCanvas(bytes, row, side) {
  const canvas = new OffscreenCanvas(side, side);
  const image = new ImageData(side, side);
  const start = row * side * side;
  for (let pixel = 0; pixel < side * side; pixel += 1) {
    const grey = bytes[start + pixel];
    image.data.set([grey, grey, grey, 255], pixel * 4);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function heatCanvas(values, row, [height, width]) {
  const canvas = new OffscreenCanvas(width, height);
  const image = new ImageData(width, height);
  const start = row * height * width;
  for (let patch = 0; patch < height * width; patch += 1) {
    const value = values[start + patch];
    image.data.set(heatTable.subarray(value * 4, value * 4 + 4), patch * 4);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

export function decodeHeat(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** Sizes a canvas to its place on the page and the screen's density; gives its context and size in CSS pixels. */
function fit(canvas) {
  const dense = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = Math.max(1, Math.round(width * dense));
  canvas.height = Math.max(1, Math.round(height * dense));
  const context = canvas.getContext("2d");
  context.scale(dense, dense);
  return { context, width, height };
}

export function drawThumbnail(canvas, bytes, row, side) {
  const { context, width, height } = fit(canvas);
  context.imageSmoothingQuality = "high";
  context.drawImage(greyCanvas(bytes, row, side), 0, 0, width, height);
}

/** One stack on a canvas. `show` draws it; the page keeps which slice is shown. */
export class Viewer {
  #canvas;
  #stack = null;
  #bytes = null;
  #state = { row: 0, heat: null, opacity: 0 };

  constructor(canvas) {
    this.#canvas = canvas;
    new ResizeObserver(() => this.#paint()).observe(canvas);
  }

  /** `stack` as the server describes it; `bytes` of its previews, null where the cache keeps none. */
  setStack(stack, bytes) {
    this.#stack = stack;
    this.#bytes = bytes;
    this.#state = { row: 0, heat: null, opacity: 0 };
  }

  /** `heat` is {values, row, grid} or null; `opacity` in 0..1. */
  show(row, heat, opacity) {
    this.#state = { row, heat, opacity };
    this.#paint();
  }

  #paint() {
    const { context, width, height } = fit(this.#canvas);
    context.clearRect(0, 0, width, height);
    if (!this.#stack) return;
    context.font = "13px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    if (!this.#bytes) {
      context.fillStyle = "#9aa7b5";
      context.fillText("No previews in this cache", width / 2, height / 2 - 10);
      context.fillText("extract with --preview 128 to see slices", width / 2, height / 2 + 12);
      return;
    }
    context.imageSmoothingQuality = "high";
    context.drawImage(greyCanvas(this.#bytes, this.#state.row, this.#stack.preview), 0, 0, width, height);
    const { heat, opacity } = this.#state;
    if (heat && opacity > 0) {
      const [left, top, right, bottom] = this.#stack.image;
      context.save();
      context.beginPath(); // none beside the image, where its slice was filled up to a square
      context.rect(left * width, top * height, (right - left) * width, (bottom - top) * height);
      context.clip();
      context.globalAlpha = opacity;
      context.drawImage(heatCanvas(heat.values, heat.row, heat.grid), 0, 0, width, height);
      context.restore();
    }
    this.#paintLetters(context, width, height);
  }

  #paintLetters(context, width, height) {
    const letters = LETTERS[this.#stack.view.split("/").pop()];
    if (!letters) return;
    context.fillStyle = "rgb(207 216 227 / 0.8)";
    const [left, right, top, bottom] = letters;
    context.fillText(left, 11, height / 2);
    context.fillText(right, width - 11, height / 2);
    context.fillText(top, width / 2, 12);
    context.fillText(bottom, width / 2, height - 12);
  }
}

/** Bars over a scrubber: one per slice, the shown one strong. `values` of the slices, null where there is none. */
export function drawBars(canvas, values, shown) {
  const { context, width, height } = fit(canvas);
  context.clearRect(0, 0, width, height);
  if (!values || !values.length) return;
  const style = getComputedStyle(document.documentElement);
  const known = values.filter((value) => value !== null);
  const highest = Math.max(...known, 1e-9);
  const lowest = Math.min(...known, 0) < 0 ? Math.min(...known) : 0;
  const step = values.length > 1 ? width / (values.length - 1) : width;
  const bar = Math.max(1, Math.min(step * 0.72, 12));
  values.forEach((value, row) => {
    if (value === null) return;
    const tall = Math.max(1, ((value - lowest) / (highest - lowest)) * (height - 2));
    const x = values.length > 1 ? row * step : width / 2;
    context.fillStyle = style.getPropertyValue(row === shown ? "--bar-strong" : "--bar");
    context.fillRect(x - bar / 2, height - tall, bar, tall);
  });
}
