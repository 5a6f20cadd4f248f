// Owns the case and its neighbour side by side: views, scrubbers, heat and matched slices.

import { Latest, getBytes, getJson } from "/static/api.js";
import { $, fillSelect, format, make, say } from "/static/dom.js";
import { Viewer, decodeHeat, drawBars, drawThumbnail } from "/static/viewer.js";

const MATCH = "match";

/** One of the two sides: a case, the stack shown of it, and its elements. */
class Side {
  constructor(name) {
    this.viewer = new Viewer($(`${name}-image`));
    this.image = $(`${name}-image`);
    this.bars = $(`${name}-bars`);
    this.slider = $(`${name}-slice`);
    this.place = $(`${name}-place`);
    this.clear();
  }

  clear() {
    Object.assign(this, { parameters: null, name: "", stacks: [], stack: null, bytes: null, row: 0, overlay: null });
  }

  async open(view, signal) {
    this.stack = this.stacks.find((stack) => stack.view === view) || null;
    const wanted = this.stack?.preview;
    this.bytes = wanted ? await getBytes("/api/preview", { ...this.parameters, view }, signal) : null;
    const count = this.stack?.slices || 1;
    this.slider.max = count - 1;
    this.slider.disabled = count < 2;
    this.viewer.setStack(this.stack, this.bytes);
    this.row = Math.floor((count - 1) / 2);
  }

  show(heat, opacity, values, note) {
    this.slider.value = this.row;
    this.viewer.show(this.row, heat, opacity);
    drawBars(this.bars, values, this.row);
    if (!this.stack) {
      this.place.textContent = this.name ? "does not have this view" : "";
      return;
    }
    const { indices, positions_mm: places, blank } = this.stack;
    const words = [`slice ${indices[this.row]}`, `${this.row + 1} of ${indices.length}`, `${format(places[this.row])} mm`];
    if (blank[this.row]) words.push("blank, left out");
    if (note) words.push(note);
    this.place.textContent = words.join(" · ");
    this.slider.setAttribute("aria-valuetext", this.place.textContent);
    this.image.setAttribute("aria-label", `${this.name}, ${this.stack.view}, ${this.place.textContent}`);
  }
}

export class CasePanel {
  #query = new Side("query");
  #other = new Side("other");
  #view = "";
  #comparison = null;
  #matchHeat = null;
  #loading = new Latest();
  #comparing = new Latest();
  #heating = new Latest();
  #matching = new Latest();
  #runs;
  #report;
  #lastHeat = "";

  constructor({ runs, report }) {
    this.#runs = runs;
    this.#report = report;
    const heats = runs.map(({ name }) => ({ value: name, label: `run ${name}` }));
    fillSelect($("heat"), [{ value: "", label: "none" }, { value: MATCH, label: "what matched" }, ...heats]);
    $("heat").addEventListener("change", () => this.#chooseHeat());
    $("class").addEventListener("change", () => this.#loadHeat({ seek: true }));
    $("opacity").addEventListener("input", () => this.#show());
    this.#query.slider.addEventListener("input", () => this.setRow(Number(this.#query.slider.value)));
    this.#other.slider.addEventListener("input", () => {
      this.#other.row = Number(this.#other.slider.value);
      this.#show();
    });
    for (const side of [this.#query, this.#other]) {
      side.image.addEventListener("wheel", (event) => this.#wheel(event, side), { passive: false });
    }
  }

  get parameters() {
    return this.#query.parameters;
  }

  /** `parameters` name the case to the server; `info` is what it said of it. */
  async setCase(parameters, name, info) {
    Object.assign(this.#query, { parameters, name, stacks: info.stacks });
    this.#other.clear();
    this.#comparison = null;
    this.#matchHeat = null;
    $("query-name").textContent = name;
    const views = info.stacks.map(({ view }) => view);
    if (!views.includes(this.#view)) this.#view = views[0];
    this.#renderViews(views);
    await this.#openView(this.#view);
  }

  async setNeighbour(found) {
    this.#other.clear();
    this.#comparison = null;
    this.#matchHeat = null;
    $("other").hidden = !found;
    $("matches").hidden = true;
    if (!found) return this.#show();
    const loaded = await this.#comparing.run(async (signal) => {
      const others = { case: found.case_id };
      return Promise.all([
        getJson("/api/case", others, signal),
        getJson("/api/compare", { ...this.#query.parameters, with: found.case_id }, signal).catch((error) => {
          if (error.name === "AbortError") throw error;
          this.#report(error);
          return null;
        }),
      ]);
    });
    if (!loaded) return undefined;
    const [info, comparison] = loaded;
    Object.assign(this.#other, { parameters: { case: found.case_id }, name: found.case_id, stacks: info.stacks });
    this.#comparison = comparison;
    $("other-name").textContent = found.case_id;
    $("other-similarity").textContent = `similarity ${found.similarity.toFixed(3)}`;
    await this.#openOther();
    return undefined;
  }

  setRow(row) {
    const last = (this.#query.stack?.slices || 1) - 1;
    this.#query.row = Math.min(Math.max(row, 0), last);
    this.#follow();
    this.#show();
    if ($("heat").value === MATCH) this.#loadMatchHeat();
  }

  stepRow(step) {
    this.setRow(this.#query.row + step);
  }

  toggleHeat() {
    const select = $("heat");
    const first = this.#runs[0]?.name || MATCH;
    [select.value, this.#lastHeat] = select.value ? ["", select.value] : [this.#lastHeat || first, ""];
    this.#chooseHeat();
  }

  redraw() {
    this.#show();
  }

  #renderViews(views) {
    const buttons = views.map((view) => {
      const [name, plane] = [view.slice(0, view.lastIndexOf("/")), view.slice(view.lastIndexOf("/") + 1)];
      const button = make("button", { type: "button", "aria-pressed": String(view === this.#view) }, `${name} · ${plane}`);
      button.dataset.view = view;
      button.addEventListener("click", () => this.#openView(view));
      return button;
    });
    $("views").replaceChildren(...buttons);
  }

  async #openView(view) {
    this.#view = view;
    for (const button of $("views").children) button.setAttribute("aria-pressed", String(button.dataset.view === view));
    await this.#guard(async () => {
      await this.#loading.run(async (signal) => {
        await this.#query.open(view, signal);
        return true;
      });
      await this.#openOther();
    });
  }

  async #openOther() {
    await this.#guard(async () => {
      if (this.#other.parameters) {
        await this.#comparing.run(async (signal) => {
          await this.#other.open(this.#view, signal);
          return true;
        });
      }
      this.#follow();
      this.#renderMatches();
      await this.#loadHeat();
    });
  }

  #wheel(event, side) {
    if (event.ctrlKey || !side.stack) return;
    event.preventDefault();
    const step = Math.sign(event.deltaY);
    if (side === this.#query) this.stepRow(step);
    else {
      side.row = Math.min(Math.max(side.row + step, 0), side.stack.slices - 1);
      this.#show();
    }
  }

  /** {match, similarity} of a row of the query in this view; undefined where it has none. */
  #matchOf(row) {
    const view = this.#comparison?.views[this.#view];
    const place = view ? view.rows.indexOf(row) : -1;
    return place < 0 ? undefined : { match: view.matches[place], similarity: view.similarities[place] };
  }

  #follow() {
    const found = this.#matchOf(this.#query.row);
    if (found && this.#other.stack) this.#other.row = found.match;
  }

  #chooseHeat() {
    const run = this.#runs.find(({ name }) => name === $("heat").value);
    const classes = run?.classes || [];
    $("class-field").hidden = classes.length < 2;
    const named = classes.map((name) => ({ value: name, label: `${run.target} = ${name}` }));
    if (run?.kind === "binary") fillSelect($("class"), named, classes[1]);
    else fillSelect($("class"), [{ value: "", label: "its answer" }, ...named]);
    this.#loadHeat({ seek: true });
  }

  /** `seek` goes to the slice of most evidence, where a run's heat was just asked for. */
  async #loadHeat({ seek = false } = {}) {
    const chosen = $("heat").value;
    this.#matchHeat = null;
    this.#query.overlay = null;
    this.#other.overlay = null;
    if (chosen === MATCH) await this.#loadMatchHeat();
    else if (chosen && this.#query.parameters) await this.#loadOverlays(chosen);
    else say($("heat-note"), " ");
    $("heat-scale").hidden = !chosen;
    const weights = this.#query.overlay?.views[this.#view]?.weights;
    if (seek && weights) this.setRow(weights.indexOf(Math.max(...weights)));
    else this.#show();
  }

  async #loadOverlays(run) {
    say($("heat-note"), "computing …");
    await this.#guard(async () => {
      const wanted = [this.#query, this.#other].filter((side) => side.parameters);
      const found = await this.#heating.run((signal) =>
        Promise.all(
          wanted.map((side) =>
            getJson("/api/overlay", { ...side.parameters, run, class: $("class").value }, signal),
          ),
        ),
      );
      if (!found) return;
      wanted.forEach((side, place) => {
        side.overlay = found[place];
        for (const view of Object.values(side.overlay.views)) view.values = decodeHeat(view.heat);
      });
      const how = ({ held_out: held }) => (held ? "out of fold" : "mean of all fold models");
      const words = wanted.map((side) => `${side.name}: ${side.overlay.answer} (${how(side.overlay)})`);
      const shown = this.#query.overlay.views[this.#view];
      if (shown && shown.grid[0] * shown.grid[1] === 1) words.push("this run tells slices apart, not places");
      say($("heat-note"), words.join(" · "));
    });
  }

  async #loadMatchHeat() {
    if (!this.#comparison || !this.#matchOf(this.#query.row)) {
      say($("heat-note"), this.#other.parameters ? "this slice has no match" : "choose a neighbour to match with");
      return;
    }
    if (!this.#comparison.patches) {
      say($("heat-note"), "this cache holds no patch tokens to match places by");
      return;
    }
    await this.#guard(async () => {
      const where = { ...this.#query.parameters, with: this.#other.name, view: this.#view, row: this.#query.row };
      const found = await this.#matching.run((signal) => getJson("/api/heat", where, signal));
      if (!found) return;
      this.#matchHeat = { ...found, query: decodeHeat(found.query), other: decodeHeat(found.other) };
      const range = `${found.low.toFixed(2)} to ${found.high.toFixed(2)} from dark to bright`;
      say($("heat-note"), `what each patch adds to the similarity of the two slices, ${found.similarity.toFixed(2)}: ${range}`);
      this.#show();
    });
  }

  #heatOf(side) {
    if (side.overlay) {
      const view = side.overlay.views[this.#view];
      return view ? { values: view.values, row: side.row, grid: view.grid } : null;
    }
    const heat = this.#matchHeat;
    if (!heat || heat.row !== this.#query.row) return null;
    if (side === this.#query) return { values: heat.query, row: 0, grid: heat.grid };
    return heat.match === side.row ? { values: heat.other, row: 0, grid: heat.grid } : null;
  }

  #valuesOf(side) {
    if (side.overlay) return side.overlay.views[this.#view]?.weights || null;
    if (side !== this.#query || !side.stack || !this.#comparison) return null;
    return Array.from({ length: side.stack.slices }, (_, row) => this.#matchOf(row)?.similarity ?? null);
  }

  #show() {
    const opacity = Number($("opacity").value) / 100;
    const found = this.#matchOf(this.#query.row);
    for (const side of [this.#query, this.#other]) {
      const matched = side === this.#other && found && found.match === side.row;
      const share = side.overlay?.views[this.#view]?.weights[side.row];
      const note = [
        matched ? `matched ${found.similarity.toFixed(2)}` : "",
        share === undefined ? "" : `${Math.round(100 * share)}% of the evidence`,
      ].filter(Boolean);
      side.show(this.#heatOf(side), opacity, this.#valuesOf(side), note.join(" · "));
    }
    for (const button of $("match-list").children) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.row) === this.#query.row));
    }
  }

  #renderMatches() {
    const pairs = this.#comparison?.views[this.#view] ? this.#topPairs() : [];
    $("matches").hidden = !pairs.length || !this.#query.bytes || !this.#other.bytes;
    if (!this.#comparison || $("matches").hidden) return;
    $("matches-note").textContent = `compared by ${this.#comparison.embedding}`;
    const buttons = pairs.map((pair) => {
      const [left, right] = [make("canvas"), make("canvas")];
      const words = `${this.#query.stack.indices[pair.row]} ↔ ${this.#other.stack.indices[pair.match]} · ${pair.similarity.toFixed(2)}`;
      const button = make("button", { type: "button" }, left, right, make("span", {}, words));
      button.dataset.row = pair.row;
      button.setAttribute("aria-label", `Query slice beside neighbour's slice, with similarity: ${words}`);
      button.addEventListener("click", () => this.setRow(pair.row));
      return { button, left, right, pair };
    });
    $("match-list").replaceChildren(...buttons.map(({ button }) => button));
    for (const { left, right, pair } of buttons) {
      drawThumbnail(left, this.#query.bytes, pair.row, this.#query.stack.preview);
      drawThumbnail(right, this.#other.bytes, pair.match, this.#other.stack.preview);
    }
  }

  /** The best pairs of this view, no slice of the neighbour twice, in the order of the query's slices. */
  #topPairs() {
    const view = this.#comparison.views[this.#view];
    const pairs = view.rows.map((row, place) => ({ row, match: view.matches[place], similarity: view.similarities[place] }));
    const taken = new Set();
    const best = pairs
      .sort((a, b) => b.similarity - a.similarity)
      .filter(({ match }) => !taken.has(match) && taken.add(match))
      .slice(0, 6);
    return best.sort((a, b) => a.row - b.row);
  }

  async #guard(work) {
    try {
      await work();
    } catch (error) {
      say($("heat-note"), " ");
      this.#report(error);
    }
  }
}
