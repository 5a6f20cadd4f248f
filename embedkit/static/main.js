// Owns the page: what is selected, and which part hears of it. Everything shown comes from the server.

import { Latest, getBytes, getJson } from "/static/api.js";
import { CasePanel } from "/static/casepanel.js";
import { colourColumn, scaleColours } from "/static/colours.js";
import { $, fillSelect, format, make, say } from "/static/dom.js";
import { labelTable, predictionTable } from "/static/facts.js";
import { CohortMap } from "/static/map.js";
import { UploadDialog } from "/static/upload.js";
import { drawThumbnail } from "/static/viewer.js";

const MOST_FOUND = 50;
const FILTER_AFTER_MS = 350;

let cohort;
let panel;
let map;
let numbers;
let colouring = null;
let column = null;
let subject = null; // {parameters, name, labels}
let neighbours = [];
let current = -1; // place in neighbours
let applied = ""; // the filter that what is shown went through: the last that worked
const latest = { column: new Latest(), map: new Latest(), filter: new Latest(), case: new Latest(), found: new Latest() };

function report(error) {
  say($("trouble"), error.message);
  clearTimeout(report.timer);
  report.timer = setTimeout(() => say($("trouble"), ""), 8000);
}

const guard = (work) => (...given) => Promise.resolve(work(...given)).catch(report);

// ---- the map ----

function showColours() {
  if (!column) {
    map.setColours([]);
    $("legend").replaceChildren();
    return;
  }
  colouring = colourColumn(column);
  map.setColours(column.values.map(colouring.of));
  const key = (colour, words) => {
    const swatch = make("span", { className: "swatch" });
    swatch.style.background = colour;
    return make("span", { className: "key" }, swatch, words);
  };
  const unknown = column.values.filter((value) => value === null).length;
  const parts = [];
  if (colouring.kind === "number") {
    const bar = make("canvas", { width: 320, height: 20 });
    const context = bar.getContext("2d");
    scaleColours.forEach((colour, step) => {
      context.fillStyle = colour;
      context.fillRect((step * 320) / scaleColours.length, 0, 320 / scaleColours.length + 1, 20);
    });
    parts.push(make("span", { className: "key" }, format(colouring.low), bar, format(colouring.high)));
  } else {
    for (const { name, colour, count } of colouring.entries) parts.push(key(colour, `${name} (${count})`));
    if (colouring.rest) parts.push(key(colouring.rest.colour, colouring.rest.name));
  }
  if (unknown) parts.push(key("var(--unknown)", `unknown (${unknown})`));
  $("legend").replaceChildren(...parts);
}

async function chooseColumn() {
  const name = $("colour").value;
  column = null;
  if (name) {
    const found = await latest.column.run((signal) => getJson("/api/column", { name }, signal));
    if (!found) return;
    column = found;
  }
  showColours();
  renderNeighbours();
}

async function chooseProjection() {
  const projection = $("projection").value;
  say($("map-note"), projection === "pca" ? "" : "laying out the map …");
  try {
    const points = await latest.map.run((signal) => getJson("/api/map", { projection }, signal));
    if (points) map.setPoints(points);
  } finally {
    say($("map-note"), "");
  }
}

function hover(number, place) {
  const tooltip = $("tooltip");
  tooltip.hidden = number < 0;
  if (number < 0) return;
  const value = column ? ` · ${column.name} ${format(column.values[number])}` : "";
  tooltip.textContent = `${cohort.cases[number]}${value}`;
  const left = Math.min(place.x + 12, Math.max(0, $("map").clientWidth - tooltip.offsetWidth - 4));
  tooltip.style.left = `${left}px`;
  tooltip.style.top = `${place.y + 14}px`;
}

function markMap() {
  const selected = subject?.parameters.case === undefined ? -1 : numbers.get(subject.parameters.case);
  const found = neighbours.map(({ case_id: id }) => numbers.get(id));
  map.setSelection(selected, found, current < 0 ? -1 : found[current]);
}

// ---- the filter ----

async function applyFilter() {
  const where = $("where").value.trim();
  const field = $("where");
  try {
    const found = await latest.filter.run((signal) => getJson("/api/filter", { where }, signal));
    if (!found) return;
    applied = where;
    say($("where-error"), "");
    field.removeAttribute("aria-invalid");
    $("where-count").textContent = where ? `${found.allowed.length} of ${cohort.cases.length}` : "";
    map.setAllowed(where ? new Set(found.allowed) : null);
  } catch (error) {
    say($("where-error"), `${error.message}. Still shown: ${applied || "all cases"}`);
    field.setAttribute("aria-invalid", "true");
    return;
  }
  await findNeighbours();
}

// ---- the case ----

async function selectCase(id) {
  await select({ case: id }, id);
  history.replaceState(null, "", `#case=${encodeURIComponent(id)}`);
}

async function select(parameters, name) {
  const info = await latest.case.run((signal) => getJson("/api/case", parameters, signal));
  if (!info) return;
  subject = { parameters, name, labels: info.labels, predictions: info.predictions };
  if (parameters.upload) $("find-case").value = "";
  $("other-patients").disabled = !info.patient_known;
  $("other-patients").title = info.patient_known ? "" : "Whose scan this is was not told when it was sent";
  $("hint").hidden = true;
  $("case").hidden = false;
  $("facts").hidden = false;
  neighbours = [];
  current = -1;
  markMap();
  renderFacts();
  await panel.setCase(parameters, name, info);
  await findNeighbours();
}

function renderFacts() {
  const other = current < 0 ? null : neighbours[current];
  $("predictions").replaceChildren(predictionTable(subject.predictions));
  $("labels").replaceChildren(labelTable(subject.labels, other?.labels, other?.case_id));
}

async function findNeighbours() {
  if (!subject) return;
  const wanted = {
    ...subject.parameters,
    k: $("count").value || 10,
    where: applied,
    exclude_same_patient: $("other-patients").checked && !$("other-patients").disabled ? 1 : "",
  };
  const found = await latest.found.run((signal) => getJson("/api/neighbours", wanted, signal));
  if (!found) return;
  const before = current < 0 ? null : neighbours[current]?.case_id;
  neighbours = found.neighbours;
  say($("neighbours-note"), neighbours.length ? "" : "no case is left to compare with; loosen the filter");
  renderNeighbours();
  const kept = neighbours.findIndex(({ case_id: id }) => id === before);
  if (kept >= 0) {
    current = kept;
    pressNeighbour();
  } else {
    await chooseNeighbour(neighbours.length ? 0 : -1);
  }
}

function renderNeighbours() {
  const cards = neighbours.map((found, place) => {
    const canvas = make("canvas", { "aria-hidden": "true" });
    const dot = make("span", { className: "dot" });
    const value = column?.values[numbers.get(found.case_id)];
    dot.hidden = !column;
    dot.style.background = (column && colouring.of(value)) || "var(--unknown)";
    const line = make("span", { className: "line" }, dot, found.similarity.toFixed(3));
    if (column) line.append(` · ${format(value)}`);
    if (found.same_patient) line.append(make("span", { className: "tag" }, "same patient"));
    const button = make(
      "button",
      { type: "button", "aria-pressed": String(place === current), title: found.case_id },
      canvas,
      make("span", { className: "rank" }, String(found.rank)),
      make("span", { className: "name" }, found.case_id),
      line,
    );
    button.addEventListener("click", guard(() => chooseNeighbour(place)));
    if (found.thumbnail) guard(drawCard)(canvas, found);
    return make("li", {}, button);
  });
  $("neighbours").replaceChildren(...cards);
}

async function drawCard(canvas, { case_id: id, thumbnail }) {
  const { view, row, side } = thumbnail;
  const bytes = await getBytes("/api/preview", { case: id, view, row });
  if (canvas.isConnected) drawThumbnail(canvas, bytes, 0, side);
}

function pressNeighbour() {
  [...$("neighbours").children].forEach((item, place) => {
    item.firstChild.setAttribute("aria-pressed", String(place === current));
  });
  markMap();
  renderFacts();
}

async function chooseNeighbour(place) {
  current = place;
  pressNeighbour();
  await panel.setNeighbour(neighbours[place]);
}

// ---- keys, theme, start ----

function listenToKeys() {
  const actions = {
    ArrowLeft: () => panel.stepRow(-1),
    ArrowRight: () => panel.stepRow(1),
    j: () => neighbours.length && chooseNeighbour(Math.min(current + 1, neighbours.length - 1)),
    k: () => neighbours.length && chooseNeighbour(Math.max(current - 1, 0)),
    o: () => panel.toggleHeat(),
    "/": () => $("where").focus(),
  };
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, textarea, dialog");
    const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !action || !subject) return;
    event.preventDefault();
    guard(action)();
  });
}

function listenToTheme() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const set = (theme) => {
    document.documentElement.dataset.theme = theme;
    map.draw();
    panel.redraw();
  };
  set(localStorage.getItem("embedkit-theme") || (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", () => localStorage.getItem("embedkit-theme") || set(dark.matches ? "dark" : "light"));
  $("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("embedkit-theme", theme);
    set(theme);
  });
}

function listenToFind() {
  const field = $("find-case");
  field.addEventListener("input", () => {
    if (numbers.has(field.value)) return guard(selectCase)(field.value);
    const wanted = field.value.toLowerCase();
    const found = wanted ? cohort.cases.filter((id) => id.toLowerCase().includes(wanted)).slice(0, MOST_FOUND) : [];
    $("found-cases").replaceChildren(...found.map((value) => make("option", { value })));
    return undefined;
  });
  $("find").addEventListener("submit", (event) => {
    event.preventDefault();
    const wanted = field.value.toLowerCase();
    const found = cohort.cases.find((id) => id.toLowerCase().includes(wanted));
    if (found === undefined) report(new Error(`no case is called ${field.value}`));
    else guard(selectCase)(found);
  });
}

function listenToFilters() {
  let timer;
  $("where").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(guard(applyFilter), FILTER_AFTER_MS);
  });
  $("filters").addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(timer);
    guard(applyFilter)();
  });
  $("other-patients").addEventListener("change", guard(findNeighbours));
  $("count").addEventListener("change", guard(findNeighbours));
}

function exampleFilter(columns) {
  const named = columns.find(({ kind }) => kind !== "text");
  if (!named) return "an SQL condition over the columns";
  const name = /^\w+$/.test(named.name) ? named.name : `"${named.name}"`;
  const value = typeof named.example === "string" ? `'${named.example.replaceAll("'", "''")}'` : named.example;
  return `for example ${name} ${named.kind === "number" ? ">" : "="} ${value}`;
}

async function start() {
  cohort = await getJson("/api/cohort");
  numbers = new Map(cohort.cases.map((id, number) => [id, number]));
  const unindexed = cohort.unindexed ? ` (${cohort.unindexed} more in the cache, not indexed)` : "";
  $("summary").textContent = `${cohort.cases.length} cases${unindexed} · ${cohort.backbone} · ${cohort.embedding}`;
  $("summary").title = $("summary").textContent;
  const [columns, labels] = [cohort.columns.filter(({ kind }) => kind !== "text"), cohort.columns.filter(({ label }) => label)];
  $("where").placeholder = exampleFilter(labels);
  panel = new CasePanel({ runs: cohort.runs, report });
  map = new CohortMap($("map"), { onSelect: (number) => guard(selectCase)(cohort.cases[number]), onHover: hover });
  fillSelect($("colour"), [{ value: "", label: "nothing" }, ...columns.map(({ name }) => ({ value: name, label: name }))], columns[0]?.name);
  const projections = { pca: "PCA", umap: "UMAP", tsne: "t-SNE" };
  fillSelect($("projection"), cohort.projections.map((value) => ({ value, label: projections[value] })));
  new UploadDialog({
    views: cohort.query_views,
    limit: cohort.upload_limit_bytes,
    onDone: guard((key, name) => select({ upload: key }, name)),
  });
  listenToTheme();
  listenToKeys();
  listenToFind();
  listenToFilters();
  $("colour").addEventListener("change", guard(chooseColumn));
  $("projection").addEventListener("change", guard(chooseProjection));
  $("map-reset").addEventListener("click", () => map.reset());
  await Promise.all([chooseColumn(), chooseProjection()]);
  const asked = new URLSearchParams(location.hash.slice(1)).get("case");
  if (asked !== null) await selectCase(asked);
  document.documentElement.dataset.ready = "true";
}

guard(start)();
