// The world, coloured by who serves whom.

import { $, colourOf, count, countryName, h, keyed, rate, s, say } from './dom.js';

const WIDTH = 1000;
const TOP = 10; // Almost nobody lives north of this line,
const HEIGHT = 420; // or south of that one.
const TINY = 4;

const paths = new Map();
let layers;
let latest;

const at = ({ latitude, longitude }) => [((longitude + 180) / 360) * WIDTH, ((90 - latitude) / 180) * 500];

/** Rhumb lines from wind roses, as on a portolan chart. */
function rhumbs() {
  const roses = [[170, 90], [500, 215], [830, 90], [170, 340], [830, 340]];
  let d = '';
  for (const [x, y] of roses) {
    for (let wind = 0; wind < 16; wind += 1) {
      const angle = (wind / 16) * 2 * Math.PI;
      d += `M${x} ${y}l${(Math.cos(angle) * 1400).toFixed(0)} ${(Math.sin(angle) * 1400).toFixed(0)}`;
    }
  }
  return s('path', { d, class: 'rhumbs' });
}

export async function build() {
  let world;
  try {
    world = await (await fetch('/page/world.json')).json();
  } catch {
    setTimeout(build, 5000);
    return;
  }
  const land = s('g', { class: 'land' });
  // Small countries lie on neighbours that have no hole for them.
  const sorted = Object.entries(world.countries).sort((a, b) => b[1].length - a[1].length);
  for (const [code, d] of sorted) {
    if (code === 'AQ') continue;
    const path = s('path', { d, 'data-country': code });
    paths.set(code, path);
    land.append(path);
  }
  layers = { arcs: s('g', { class: 'arcs' }), spots: s('g', { class: 'spots' }) };
  const svg = s('svg', { viewBox: `0 ${TOP} ${WIDTH} ${HEIGHT}`, role: 'img', 'aria-label': 'World map' }, rhumbs(), land, layers.arcs, layers.spots);
  const tip = h('div', { class: 'tip', hidden: true });
  $('#map').append(svg, tip);
  // What is too small to be seen gets a mark.
  for (const path of [...paths.values()]) {
    const box = path.getBBox();
    if (box.width < TINY && box.height < TINY) {
      const dot = s('circle', { cx: box.x + box.width / 2, cy: box.y + box.height / 2, r: 1.4, 'data-country': path.dataset.country });
      paths.set(path.dataset.country, dot);
      path.replaceWith(dot);
    }
  }
  svg.addEventListener('pointermove', (event) => show(event, tip));
  svg.addEventListener('click', (event) => show(event, tip));
  // A finger that is lifted has not gone elsewhere.
  svg.addEventListener('pointerleave', (event) => (tip.hidden = event.pointerType === 'mouse' || tip.hidden));
  $('#everybody').addEventListener('toggle', () => latest && everybody(latest));
  if (latest) update(latest);
}

function show(event, tip) {
  const code = event.target.dataset?.country;
  const seen = latest?.countries[code];
  tip.hidden = !seen;
  if (!seen) return;
  const traffic = seen.traffic ? `${rate(seen.traffic.per_second)} requests/s` : 'no requests';
  const home = seen.home ? `, in place of ${seen.home}` : '';
  say(tip, `${countryName(code)}: ${seen.region ?? 'nobody'}${home}, ${traffic}`);
  const box = $('#map').getBoundingClientRect();
  const below = event.clientY - box.top + 12;
  tip.style.left = `${Math.max(0, Math.min(event.clientX - box.left + 12, box.width - tip.offsetWidth))}px`;
  tip.style.top = `${below + tip.offsetHeight > box.height ? below - tip.offsetHeight - 24 : below}px`;
}

/** From light to full by the logarithm of the rate. */
const strength = (perSecond) => (perSecond ? Math.min(0.95, 0.5 + 0.15 * Math.log10(1 + perSecond * 10)) : 0.3);

const countries = (n) => `${count(n)} ${n === 1 ? 'country' : 'countries'}`;

function set(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

export function update(now) {
  latest = now;
  if (!layers) return;
  const served = new Map();
  for (const [code, path] of paths) {
    const seen = now.countries[code];
    const region = seen?.region ?? '';
    set(path, 'data-region', region);
    set(path, 'class', `${colourOf(now.regions, region)}${seen?.home ? ' moved' : ''}`);
    set(path, 'fill-opacity', strength(seen?.traffic?.per_second).toFixed(2));
    served.set(region, (served.get(region) ?? 0) + 1);
  }
  const words = [...served].filter(([region]) => region).map(([region, n]) => `${region} serves ${countries(n)}`);
  if (served.get('')) words.push(`nobody serves ${served.get('')}`);
  set($('#map svg'), 'aria-label', `World map: ${words.join(', ')}.`);
  spots(now);
  arcs(now);
  legend(now, served);
  everybody(now);
}

/** The map for those who cannot see it, or cannot tell its colours apart. */
function everybody(now) {
  const list = $('#everybody');
  if (!list.open) return;
  const rows = Object.entries(now.countries).map(([code, seen]) => ({ code, name: countryName(code), ...seen }));
  rows.sort((a, b) => a.name.localeCompare(b.name));
  keyed(
    list.querySelector('tbody'),
    rows,
    ({ code }) => code,
    () => h('tr', {}, h('th', { scope: 'row' }), h('td', {}), h('td', { class: 'n' })),
    (row, { code, name, region, home, traffic }) => {
      say(row.children[0], `${name} (${code})`);
      say(row.children[1], `${region ?? 'nobody'}${home ? ` in place of ${home}` : ''}`);
      say(row.children[2], rate(traffic?.per_second));
    },
  );
}

export const stateOf = (region) => {
  if (region.order) return region.order.kind;
  if (!region.healthy) return 'unhealthy';
  return region.usable < 1 ? 'degraded' : 'healthy';
};

/** Regions that take no new requests get a cross: colour alone tells nobody. */
const OUT = ['unhealthy', 'evacuated', 'drained'];
const LETTERS = 18;

function spots(now) {
  const placed = [];
  keyed(
    layers.spots,
    now.regions.filter((region) => region.spot),
    (region) => region.name,
    (region) => s('g', {}, s('title', {}, region.name), s('circle', { r: 8 }), s('circle', { r: 4.5, class: 'core' }), s('path', { d: 'M-3 -3L3 3M3 -3L-3 3', class: 'cross' }), s('text', {})),
    (group, region) => {
      const [x, y] = at(region.spot);
      set(group, 'transform', `translate(${x.toFixed(1)} ${y.toFixed(1)})`);
      const state = stateOf(region);
      set(group, 'class', `${colourOf(now.regions, region.name)} ${OUT.includes(state) ? 'out' : state}`);
      const name = region.name.length > LETTERS ? `${region.name.slice(0, LETTERS - 1)}…` : region.name;
      say(group.lastChild, OUT.includes(state) ? `${name}: ${state}` : name);
      // One above the other, where names would meet.
      const meets = (dy) => placed.some(([px, py]) => Math.abs(px - x) < 75 && Math.abs(py - (y + dy)) < 13);
      const dy = [-12, 22, -25, 35].find((dy) => !meets(dy)) ?? -12;
      placed.push([x, y + dy]);
      set(group.lastChild, 'y', dy);
      // Names stay on the map.
      set(group.lastChild, 'text-anchor', x < 90 ? 'start' : x > WIDTH - 90 ? 'end' : 'middle');
    },
  );
}

function arcs(now) {
  const spot = (name) => now.regions.find((region) => region.name === name)?.spot;
  const moving = new Map();
  for (const { from, to, minute } of now.failovers) {
    if (minute && spot(from) && spot(to)) moving.set(`${from} ${to}`, { from, to, minute: minute + (moving.get(`${from} ${to}`)?.minute ?? 0) });
  }
  keyed(
    layers.arcs,
    [...moving.values()],
    ({ from, to }) => `${from} ${to}`,
    ({ from, to }) => s('path', { 'data-from': from, 'data-to': to }),
    (path, { from, to, minute }) => {
      const [[x1, y1], [x2, y2]] = [at(spot(from)), at(spot(to))];
      const bend = Math.min(90, Math.hypot(x2 - x1, y2 - y1) * 0.25);
      set(path, 'd', `M${x1.toFixed(1)} ${y1.toFixed(1)}Q${((x1 + x2) / 2).toFixed(1)} ${((y1 + y2) / 2 - bend).toFixed(1)} ${x2.toFixed(1)} ${y2.toFixed(1)}`);
      set(path, 'class', colourOf(now.regions, to));
      set(path, 'stroke-width', Math.min(5, 1.2 + Math.log10(1 + minute)).toFixed(1));
    },
  );
}

function legend(now, served) {
  keyed(
    $('#legend'),
    now.regions,
    (region) => region.name,
    (region) => h('li', {}, h('span', { class: 'swatch' }), h('b', {}, region.name), ' ', h('span', { class: 'state' }), ' ', h('span', { class: 'quiet' })),
    (item, region) => {
      const state = stateOf(region);
      set(item, 'class', colourOf(now.regions, region.name));
      const [word, rest] = item.querySelectorAll('span:not(.swatch)');
      set(word, 'class', `state ${state}`);
      say(word, state);
      say(rest, `${countries(served.get(region.name) ?? 0)}, ${rate(region.traffic['10s'].per_second)}/s`);
    },
  );
}
