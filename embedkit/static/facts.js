// Owns the tables of what is known of a case and its neighbour: predictions and labels.

import { format, make } from "/static/dom.js";

const SOURCES = {
  out_of_fold: ["out of fold", "by the model of the fold that tested this case: it never saw this patient"],
  ensemble: ["new to the run", "the mean of all fold models, none of which saw this patient"],
  new_image: ["all fold models", "the mean of all fold models; if this patient was in training, too good to judge the run by"],
  seen: ["seen in training", "by models that were trained on this patient: too good to judge the run by"],
};

export function predictionTable(predictions) {
  if (!predictions.length) {
    return make("p", { className: "quiet" }, "No run is shown; name runs after the index: embedkit serve CACHE INDEX RUN");
  }
  const head = make("tr", {}, ...["Run", "Says", "Label", "How"].map((name) => make("th", { scope: "col" }, name)));
  const rows = predictions.map((said) => {
    const [source, title] = SOURCES[said.source];
    const cell = make("td", {}, said.answer.replace(`${said.target} = `, "").replace(" with probability ", ", "));
    cell.title = said.scores.map(({ name, value }) => `${name}: ${format(value)}`).join("\n");
    if (said.probability !== null) {
      const bar = make("i");
      bar.style.width = `${Math.round(100 * said.probability)}%`;
      cell.append(make("div", { className: "meter" }, bar));
    }
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, said.run),
      cell,
      make("td", {}, format(said.truth)),
      make("td", { className: "source", title }, source),
    );
  });
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
}

/** Labels of the case beside those of its neighbour; those that differ are set strong. */
export function labelTable(labels, other, otherName) {
  const names = [...new Set([...Object.keys(labels), ...Object.keys(other || {})])];
  if (!names.length) {
    return make("p", { className: "quiet" }, "The index holds no labels; give a table with --labels");
  }
  const titles = ["", "query", ...(other ? [otherName] : [])];
  const head = make("tr", {}, ...titles.map((name) => make("th", { scope: "col" }, name)));
  const rows = names.map((name) => {
    const differs = other && format(labels[name]) !== format(other[name]);
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, name),
      make("td", {}, format(labels[name])),
      ...(other ? [make("td", { className: differs ? "differs" : "" }, format(other[name]))] : []),
    );
  });
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
}
