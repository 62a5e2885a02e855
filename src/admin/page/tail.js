// Requests as they happen.

import { $, clock, colourOf, count, h, ms, say } from './dom.js';
import { askAbout } from './explain.js';

const ROWS = 60;

let paused = false;
let skipped = 0;
let regions = [];

export function build(changed) {
  let soon;
  $('#filter').addEventListener('input', () => {
    clearTimeout(soon);
    soon = setTimeout(() => {
      $('#tail tbody').replaceChildren();
      skipped = 0;
      changed();
    }, 300);
  });
  $('#filter').addEventListener('submit', (event) => event.preventDefault());
  $('#pause').addEventListener('click', (event) => {
    paused = !paused;
    event.target.setAttribute('aria-pressed', paused);
    say(event.target, paused ? 'Go on' : 'Pause');
  });
}

/** What is asked of the server: it filters, so that what is rare is found among thousands a second. */
export function wanted() {
  const all = [...new FormData($('#filter'))].map(([name, value]) => [name, value.trim()]);
  return new URLSearchParams([['tail', 'true'], ...all.filter(([, value]) => value)]);
}

function options(name, values) {
  const select = $('#filter').elements[name];
  const first = name === 'why' ? 2 : 1;
  const known = [...select.options].slice(first).map((option) => option.value);
  const chosen = select.value;
  if (known.join() === values.join()) return;
  [...select.options].slice(first).forEach((option) => option.remove());
  select.append(...values.map((value) => h('option', {}, value)));
  select.value = [...select.options].some((option) => option.value === chosen) ? chosen : '';
}

export function update(now) {
  regions = now.regions;
  options('region', now.regions.map(({ name }) => name));
  options('route', [...now.route_names].sort().slice(0, 500));
  options('why', now.unsuccessful.map(({ why }) => why).sort());
}

function row(line) {
  const { at, client, country, method, host, path, status, why, region, attempts, cache, rules, ms: took } = line;
  const kind = status >= 500 ? 'bad' : status >= 400 ? 'warn' : '';
  return h(
    'tr',
    {},
    h('td', {}, clock(at)),
    h('td', {}, client, ' ', h('span', { class: 'quiet' }, country)),
    h('td', { class: 'path' }, `${method} ${host}${path}`),
    h('td', { class: kind }, status),
    h('td', {}, [why, ...rules].filter(Boolean).join(', ')),
    h('td', {}, region && h('span', { class: `swatch ${colourOf(regions, region)}` }), region ?? '', attempts > 1 && h('span', { class: 'quiet' }, ` after ${attempts} attempts`)),
    h('td', {}, cache ?? ''),
    h('td', { class: 'n' }, ms(took)),
    h('td', {}, h('button', { type: 'button', class: 'link', onclick: () => askAbout(line) }, 'explain')),
  );
}

export function requests({ lines, skipped: more }) {
  skipped += more;
  say($('#tail-note'), skipped ? `${count(skipped)} more were not shown: at most 50 a second are` : '');
  if (paused || !lines.length) return;
  const body = $('#tail tbody');
  body.prepend(...lines.reverse().map(row));
  while (body.children.length > ROWS) body.lastChild.remove();
}

