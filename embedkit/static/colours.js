// Owns colours of values: categories after Okabe and Ito (2008), numbers by viridis without its ends, which drown in a dark or a light page, heat by inferno; draws nothing.

const CATEGORIES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bd1", "#8a8a00", "#b0416e", "#4a5b6c"];
const VIRIDIS = ["#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59", "#b4de2c", "#fde725"];
const INFERNO = ["#000004", "#1b0c41", "#4a0c6b", "#781c6d", "#a52c60", "#cf4446", "#ed6925", "#fb9b06", "#f7d13d", "#fcffa4"];
const STEPS = 32;

const split = (colour) => [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));

function blend(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const lower = Math.min(Math.floor(place), stops.length - 2);
  const [from, to] = [split(stops[lower]), split(stops[lower + 1])];
  return from.map((value, channel) => Math.round(value + (to[channel] - value) * (place - lower)));
}

const css = ([red, green, blue]) => `rgb(${red} ${green} ${blue})`;
const scale = Array.from({ length: STEPS }, (_, step) => css(blend(VIRIDIS, 0.14 + (0.82 * step) / (STEPS - 1))));

/** 256 x RGBA: opaque where heat is high, clear where there is none. */
export const heatTable = Uint8ClampedArray.from(
  Array.from({ length: 256 }, (_, value) => [...blend(INFERNO, 0.25 + 0.75 * (value / 255)), Math.min(255, value * 1.7)]).flat(),
);

export const scaleColours = scale;

/** How the values of a column are coloured: `of(value)` gives a CSS colour, null where the value is unknown. */
export function colourColumn(column) {
  const known = column.values.filter((value) => value !== null);
  if (column.kind === "number") {
    const low = known.reduce((least, value) => Math.min(least, value), Infinity);
    const high = known.reduce((most, value) => Math.max(most, value), -Infinity);
    const of = (value) => (value === null ? null : scale[Math.round(((value - low) / (high - low || 1)) * (STEPS - 1))]);
    return { kind: "number", low, high, of };
  }
  const counts = new Map();
  for (const value of known) counts.set(value, (counts.get(value) || 0) + 1);
  const names = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a));
  const coloured = names.slice(0, names.length > CATEGORIES.length ? CATEGORIES.length - 1 : CATEGORIES.length);
  coloured.sort((a, b) => String(a).localeCompare(String(b), undefined, { numeric: true }));
  const colours = new Map(coloured.map((name, place) => [name, CATEGORIES[place]]));
  const rest = names.length - coloured.length;
  const other = CATEGORIES[CATEGORIES.length - 1];
  return {
    kind: "category",
    entries: [...colours].map(([name, colour]) => ({ name: String(name), colour, count: counts.get(name) })),
    rest: rest ? { name: `${rest} others`, colour: other } : null,
    of: (value) => (value === null ? null : colours.get(value) || other),
  };
}
