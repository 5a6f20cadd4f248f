// Owns the map: points on a canvas with pan, zoom, hover and selection; knows no server and no case but its number.

const RADIUS = 4.5;
const REACH = 12;
const MARGIN = 22;

export class CohortMap {
  #canvas;
  #onSelect;
  #onHover;
  #points = { x: [], y: [] };
  #colours = [];
  #allowed = null;
  #selected = -1;
  #neighbours = [];
  #current = -1;
  #hovered = -1;
  #view = { zoom: 1, x: 0, y: 0 };
  #drag = null;
  #frame = 0;

  constructor(canvas, { onSelect, onHover }) {
    this.#canvas = canvas;
    this.#onSelect = onSelect;
    this.#onHover = onHover;
    canvas.addEventListener("pointerdown", (event) => this.#press(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", (event) => this.#release(event));
    canvas.addEventListener("pointerleave", () => this.#hover(-1));
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    canvas.addEventListener("dblclick", () => this.reset());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  setPoints(points) {
    this.#points = points;
    this.reset();
  }

  setColours(colours) {
    this.#colours = colours;
    this.draw();
  }

  /** `allowed` is a Set of numbers of points, or null for all. */
  setAllowed(allowed) {
    this.#allowed = allowed;
    this.draw();
  }

  setSelection(selected, neighbours, current) {
    this.#selected = selected;
    this.#neighbours = neighbours;
    this.#current = current;
    this.draw();
  }

  reset() {
    this.#view = { zoom: 1, x: 0, y: 0 };
    this.draw();
  }

  draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.#paint());
  }

  /** Place of a point in CSS pixels of the canvas. */
  place(number, to = this.#transform()) {
    return { x: to.x + this.#points.x[number] * to.across, y: to.y - this.#points.y[number] * to.up };
  }

  /** Where the middle of the map lies, and how many pixels its unit takes; asks the layout once for all points. */
  #transform() {
    const { width, height } = this.#size();
    const up = (Math.min(width, height) / 2 - MARGIN) * this.#view.zoom;
    const across = up * Math.min(width / height, 1.35);
    return { x: width / 2 + this.#view.x, y: height / 2 + this.#view.y, across, up, width, height };
  }

  #size() {
    return { width: this.#canvas.clientWidth, height: this.#canvas.clientHeight };
  }

  #isAllowed(number) {
    return this.#allowed === null || this.#allowed.has(number);
  }

  #paint() {
    const { width, height } = this.#size();
    const dense = window.devicePixelRatio || 1;
    this.#canvas.width = Math.round(width * dense);
    this.#canvas.height = Math.round(height * dense);
    const context = this.#canvas.getContext("2d");
    context.scale(dense, dense);
    const style = getComputedStyle(document.documentElement);
    const unknown = style.getPropertyValue("--unknown");
    const ink = style.getPropertyValue("--ink");
    const radius = this.#points.x.length > 2000 ? RADIUS * 0.6 : RADIUS;
    const groups = new Map();
    this.#points.x.forEach((_, number) => {
      const colour = this.#isAllowed(number) ? this.#colours[number] || unknown : "";
      if (!groups.has(colour)) groups.set(colour, []);
      groups.get(colour).push(number);
    });
    const faint = groups.get("") || [];
    groups.delete("");
    this.#dots(context, faint, unknown, radius * 0.6, 0.35);
    for (const [colour, numbers] of groups) this.#dots(context, numbers, colour, radius, 0.92);
    this.#paintSelection(context, ink, style.getPropertyValue("--accent"), radius);
  }

  #dots(context, numbers, colour, radius, alpha) {
    const dense = window.devicePixelRatio || 1;
    const side = Math.ceil(2 * radius + 2);
    const stamp = new OffscreenCanvas(Math.ceil(side * dense), Math.ceil(side * dense));
    const ink = stamp.getContext("2d");
    ink.scale(dense, dense);
    ink.globalAlpha = alpha;
    ink.fillStyle = colour;
    ink.beginPath();
    ink.arc(side / 2, side / 2, radius, 0, 2 * Math.PI);
    ink.fill();
    const to = this.#transform();
    for (const number of numbers) {
      const { x, y } = this.place(number, to);
      if (x < -side || y < -side || x > to.width + side || y > to.height + side) continue;
      context.drawImage(stamp, x - side / 2, y - side / 2, side, side);
    }
  }

  #paintSelection(context, ink, accent, radius) {
    if (this.#selected >= 0) {
      const from = this.place(this.#selected);
      context.strokeStyle = ink;
      context.globalAlpha = 0.25;
      for (const number of this.#neighbours) {
        const to = this.place(number);
        context.beginPath();
        context.moveTo(from.x, from.y);
        context.lineTo(to.x, to.y);
        context.stroke();
      }
      context.globalAlpha = 1;
    }
    for (const number of this.#neighbours) this.#ring(context, number, ink, radius + 2, 1);
    if (this.#current >= 0) this.#ring(context, this.#current, accent, radius + 3, 2.5);
    if (this.#selected >= 0) this.#ring(context, this.#selected, ink, radius + 4.5, 3);
    if (this.#hovered >= 0) this.#ring(context, this.#hovered, accent, radius + 3, 2);
  }

  #ring(context, number, colour, radius, width) {
    const { x, y } = this.place(number);
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.stroke();
  }

  #nearest(x, y) {
    let best = -1;
    let least = REACH * REACH;
    const to = this.#transform();
    for (let number = 0; number < this.#points.x.length; number += 1) {
      if (!this.#isAllowed(number)) continue;
      const place = this.place(number, to);
      const distance = (place.x - x) ** 2 + (place.y - y) ** 2;
      if (distance < least) [best, least] = [number, distance];
    }
    return best;
  }

  #press(event) {
    this.#canvas.setPointerCapture(event.pointerId);
    this.#drag = { x: event.offsetX, y: event.offsetY, moved: false, from: { ...this.#view } };
  }

  #move(event) {
    if (!this.#drag) {
      this.#hover(this.#nearest(event.offsetX, event.offsetY));
      return;
    }
    const [dx, dy] = [event.offsetX - this.#drag.x, event.offsetY - this.#drag.y];
    if (Math.abs(dx) + Math.abs(dy) > 4) this.#drag.moved = true;
    if (this.#drag.moved) {
      this.#canvas.classList.add("dragging");
      this.#view = { ...this.#drag.from, x: this.#drag.from.x + dx, y: this.#drag.from.y + dy };
      this.#hover(-1);
      this.draw();
    }
  }

  #release(event) {
    const drag = this.#drag;
    this.#drag = null;
    this.#canvas.classList.remove("dragging");
    if (!drag || drag.moved) return;
    const number = this.#nearest(event.offsetX, event.offsetY);
    if (number >= 0) this.#onSelect(number);
  }

  #hover(number) {
    this.#canvas.classList.toggle("pointing", number >= 0);
    if (number === this.#hovered) return;
    this.#hovered = number;
    this.#onHover(number, number >= 0 ? this.place(number) : null);
    this.draw();
  }

  #zoom(factor, x, y) {
    const zoom = Math.min(Math.max(this.#view.zoom * factor, 0.5), 60);
    const real = zoom / this.#view.zoom;
    const { width, height } = this.#size();
    const [cx, cy] = [x - width / 2, y - height / 2];
    this.#view = { zoom, x: cx - (cx - this.#view.x) * real, y: cy - (cy - this.#view.y) * real };
    this.draw();
  }

  #wheel(event) {
    event.preventDefault();
    this.#zoom(Math.exp(-event.deltaY * 0.0015), event.offsetX, event.offsetY);
  }

  #key(event) {
    const { width, height } = this.#size();
    const directions = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in directions) this.#step(...directions[event.key]);
    else if (event.key === "+" || event.key === "=") this.#zoom(1.4, width / 2, height / 2);
    else if (event.key === "-") this.#zoom(1 / 1.4, width / 2, height / 2);
    else if (event.key === "0") this.reset();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** Selects the nearest allowed point in a direction: what lies to the side counts twice. */
  #step(dx, dy) {
    if (this.#selected < 0) {
      const first = this.#points.x.findIndex((_, number) => this.#isAllowed(number));
      if (first >= 0) this.#onSelect(first);
      return;
    }
    const from = this.place(this.#selected);
    let best = -1;
    let least = Infinity;
    for (let number = 0; number < this.#points.x.length; number += 1) {
      if (number === this.#selected || !this.#isAllowed(number)) continue;
      const to = this.place(number);
      const along = (to.x - from.x) * dx + (to.y - from.y) * dy;
      const aside = Math.abs((to.x - from.x) * dy) + Math.abs((to.y - from.y) * dx);
      if (along > 0.5 && along + 2 * aside < least) [best, least] = [number, along + 2 * aside];
    }
    if (best >= 0) this.#onSelect(best);
  }
}
