// Owns making elements: text is always set as text, never as markup.

export const $ = (id) => document.getElementById(id);

/** An element with properties, attributes (`aria-...`, `data-...`) and children (elements or text). */
export function make(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-")) element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children);
  return element;
}

export function fillSelect(select, options, chosen = undefined) {
  select.replaceChildren(...options.map(({ value, label }) => make("option", { value }, label)));
  if (chosen !== undefined && options.some(({ value }) => value === chosen)) select.value = chosen;
}

/** Shows a message in an element, or hides it where there is none. */
export function say(element, message) {
  element.textContent = message || "";
  element.hidden = !message;
}

export function format(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number" || Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
}
