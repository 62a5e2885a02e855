// Making elements, and numbers for people.

const SVG = 'http://www.w3.org/2000/svg';

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, '');
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

/** An element of HTML. Text is text: nothing of it becomes markup. */
export const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);

/** An element of SVG. */
export const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

export const $ = (selector) => document.querySelector(selector);

/** Sets a text only where it changes, so that nothing is laid out or read out again for nothing. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Brings the children of `parent` up to `rows`: those of a known key stay (and keep focus), and are updated. */
export function keyed(parent, rows, key, create, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  rows.forEach((row, at) => {
    const name = key(row);
    let child = known.get(name);
    known.delete(name);
    if (!child) {
      child = create(row);
      child.dataset.key = name;
    }
    if (parent.children[at] !== child) parent.insertBefore(child, parent.children[at] ?? null);
    update(child, row);
  });
  for (const gone of known.values()) gone.remove();
}

export function rate(perSecond) {
  if (!perSecond) return '0';
  if (perSecond >= 9950) return `${(perSecond / 1000).toFixed(1)} k`;
  if (perSecond < 0.05) return '< 0.1';
  return perSecond >= 9.95 ? perSecond.toFixed(0) : perSecond.toFixed(1);
}

export function percent(ratio, digits = 1) {
  if (!ratio) return '0 %';
  return ratio < 0.001 ? '< 0.1 %' : `${(ratio * 100).toFixed(ratio >= 0.1 ? 0 : digits)} %`;
}

export function ms(value) {
  if (value == null) return '–';
  if (value >= 999.5) return `${(value / 1000).toFixed(1)} s`;
  return value >= 10 ? `${value.toFixed(0)} ms` : `${value.toFixed(1)} ms`;
}

/** A key that no name can have. */
export const NOTHING = ' ';

export function count(value) {
  return value.toLocaleString('en');
}

export function bytes(value) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${value >= 10 || unit === 0 ? value.toFixed(0) : value.toFixed(1)} ${units[unit]}`;
}

export function span(seconds) {
  const parts = [[86400, 'd'], [3600, 'h'], [60, 'min'], [1, 's']];
  const at = parts.findIndex(([length]) => seconds >= length);
  if (at < 0) return '0 s';
  const [length, unit] = parts[at];
  const [next, nextUnit] = parts[at + 1] ?? [0, ''];
  const rest = next ? Math.floor((seconds % length) / next) : 0;
  return `${Math.floor(seconds / length)} ${unit}${rest ? ` ${rest} ${nextUnit}` : ''}`;
}

/** The time of day, with the day where that is not today. */
export function clock(unixMs) {
  const at = new Date(unixMs);
  const time = at.toLocaleTimeString('en-GB');
  return at.toDateString() === new Date().toDateString() ? time : `${at.toLocaleDateString('en-GB', { day: 'numeric', month: 'short' })} ${time}`;
}

const names = new Intl.DisplayNames(['en'], { type: 'region' });

export function countryName(code) {
  if (code === 'XX') return 'unknown';
  try {
    return names.of(code) ?? code;
  } catch {
    return code;
  }
}

/** Colours of regions, by their place in the configuration. */
export const COLOURS = 16;

export const colourOf = (regions, name) => {
  const at = regions.findIndex((region) => region.name === name);
  return at < 0 ? 'none' : `r${at % COLOURS}`;
};
