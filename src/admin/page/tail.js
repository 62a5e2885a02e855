// Requests as they happen.

import { $, clock, colourOf, count, h, ms, say } from './dom.js';
import { askAbout } from './explain.js';
import { follow } from './stream.js';

const ROWS = 60;

let paused = false;
let skipped = 0;
let held = [];
let regions = [];

/** What is asked of the process: it filters, so that what is rare is found among thousands a second. */
function path() {
  const all = [...new FormData($('#filter'))].map(([name, value]) => [name, value.trim()]);
  return `/events?${new URLSearchParams([['tail', 'true'], ...all.filter(([, value]) => value)])}`;
}

const stream = follow(path, { requests }, (why) => say($('#tail-trouble'), why === 'lost' ? '' : why));
export const { open, close } = stream;

function note() {
  const parts = [];
  if (paused) parts.push('paused');
  else if (held.length) parts.push(`${count(held.length)} new, shown once you leave the list`);
  else if (!$('#tail tbody').children.length) parts.push('waiting for requests that match');
  if (skipped) parts.push(`${count(skipped)} more were not shown: at most 50 a second are`);
  say($('#tail-note'), parts.join('; '));
}

export function build() {
  let soon;
  $('#filter').addEventListener('input', () => {
    // What is shown suits the filter, or nothing is.
    close();
    $('#tail tbody').replaceChildren();
    [skipped, held] = [0, []];
    note();
    clearTimeout(soon);
    soon = setTimeout(() => paused || open(), 400);
  });
  $('#filter').addEventListener('submit', (event) => event.preventDefault());
  $('#pause').addEventListener('click', (event) => {
    paused = !paused;
    event.target.setAttribute('aria-pressed', paused);
    // What nobody is shown need not be sent.
    if (paused) close();
    else open();
    note();
  });
  const body = $('#tail tbody');
  body.addEventListener('pointerleave', show);
  body.addEventListener('focusout', show);
  note();
}

/** The first option of a name stays; one that is chosen stays too, until another is. */
function options(name, values) {
  const select = $('#filter').elements[name];
  const first = name === 'why' ? 2 : 1;
  const chosen = select.value;
  const all = values.includes(chosen) || !chosen || chosen === 'any' ? values : [...values, chosen];
  const known = [...select.options].slice(first).map((option) => option.value);
  if (known.join() === all.join()) return;
  [...select.options].slice(first).forEach((option) => option.remove());
  select.append(...all.map((value) => h('option', {}, value)));
  select.value = chosen;
}

export function update(now) {
  regions = now.regions;
  options('region', now.regions.map(({ name }) => name));
  options('route', now.route_names.slice(0, 500).sort());
  options('why', now.unsuccessful.map(({ why }) => why).sort());
}

function row(line) {
  const { at, client, country, method, host, path: asked, status, why, region, attempts, cache, rules, ms: took } = line;
  const kind = status >= 500 ? 'bad' : status >= 400 ? 'warn' : '';
  // What could not be read cannot be explained.
  const known = method !== '-' && asked.startsWith('/');
  return h(
    'tr',
    {},
    h('td', {}, clock(at)),
    h('td', {}, client, ' ', h('span', { class: 'quiet' }, country)),
    h('td', { class: 'path' }, `${method} ${host}${asked}`),
    h('td', { class: kind }, status),
    h('td', {}, [why, ...rules].filter(Boolean).join(', ')),
    h('td', {}, region && h('span', { class: `swatch ${colourOf(regions, region)}` }), region ?? '', attempts > 1 && h('span', { class: 'quiet' }, ` after ${attempts} attempts`)),
    h('td', {}, cache ?? ''),
    h('td', { class: 'n' }, ms(took)),
    h('td', {}, known && h('button', { type: 'button', class: 'link', onclick: () => askAbout(line) }, 'explain')),
  );
}

function requests({ lines, skipped: more }) {
  skipped += more;
  held = [...held, ...lines].slice(-ROWS);
  show();
}

/** Rows do not slide away under a pointer, or under the focus. */
function show() {
  const body = $('#tail tbody');
  // Of a focus that leaves it is known only afterwards where it goes.
  queueMicrotask(() => {
    if (!body.matches(':hover') && !body.contains(document.activeElement)) {
      body.prepend(...held.reverse().map(row));
      held = [];
      while (body.children.length > ROWS) body.lastChild.remove();
    }
    note();
  });
}
