// The curves of the last five minutes.

import { $, clock, h, ms, percent, rate, s, say } from './dom.js';

const WIDTH = 300;
const HEIGHT = 90;
const POINTS = 300;

let points = [];
const charts = [];

/** One chart: its lines, each with a name, a class, and how to read it off a point. */
function chart(selector, title, lines, show) {
  const paths = lines.map(({ kind, area }) => s('path', { class: `${kind}${area ? ' area' : ''}` }));
  const cross = s('line', { y1: 0, y2: HEIGHT, class: 'cross', visibility: 'hidden' });
  const svg = s('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: 'none', role: 'img', 'aria-label': title }, ...paths, cross);
  const value = h('span', { class: 'value' });
  const most = h('span', { class: 'quiet small most' });
  const key = lines.length > 1 && h('span', { class: 'key small' }, lines.map(({ name, kind }) => h('span', { class: kind }, name)));
  $(selector).append(h('figcaption', {}, h('b', {}, title), key, value), h('div', { class: 'plot' }, svg, most));
  const made = { svg, paths, lines, cross, value, most, show, title, hover: null };
  svg.addEventListener('pointermove', (event) => {
    const box = svg.getBoundingClientRect();
    made.hover = ((event.clientX - box.left) / box.width) * POINTS;
    draw(made);
  });
  svg.addEventListener('pointerleave', () => {
    made.hover = null;
    draw(made);
  });
  charts.push(made);
}

export function build() {
  chart('#rate', 'Requests a second', [{ kind: 'main', area: true, of: (p) => p.per_second }], (p) => `${rate(p.per_second)}/s`);
  chart('#errors', 'Errors (5xx)', [{ kind: 'bad', area: true, of: (p) => p.error_ratio }], (p) => percent(p.error_ratio));
  chart(
    '#latency',
    'Latency',
    [
      { kind: 'p99', name: 'P99', of: (p) => p.p99_ms },
      { kind: 'p95', name: 'P95', of: (p) => p.p95_ms },
      { kind: 'p50', name: 'P50', of: (p) => p.p50_ms },
    ],
    (p) => (p.p50_ms == null ? '–' : `${ms(p.p50_ms)} / ${ms(p.p95_ms)} / ${ms(p.p99_ms)}`),
  );
}

function draw(made) {
  const from = POINTS - points.length;
  const values = made.lines.map(({ of }) => points.map(of));
  const highest = Math.max(...values.flat().filter((v) => v != null), 0);
  const top = highest || 1;
  const x = (at) => (((from + at) / (POINTS - 1)) * WIDTH).toFixed(1);
  const y = (v) => (HEIGHT - (v / top) * (HEIGHT - 6)).toFixed(1);
  made.lines.forEach(({ area }, n) => {
    let d = '';
    let open = false;
    values[n].forEach((v, at) => {
      // A second without requests has no latency: the line has a gap.
      if (v == null) open = false;
      else {
        d += `${open ? 'L' : 'M'}${x(at)} ${y(v)}`;
        open = true;
      }
    });
    if (area && points.length) d += `L${x(points.length - 1)} ${HEIGHT}L${x(0)} ${HEIGHT}Z`;
    made.paths[n].setAttribute('d', d);
  });
  const hovered = made.hover == null ? points.length - 1 : Math.round(made.hover) - from;
  const point = points[Math.max(0, Math.min(points.length - 1, hovered))];
  made.cross.setAttribute('visibility', made.hover == null || !point ? 'hidden' : 'visible');
  if (!point) return;
  made.cross.setAttribute('x1', x(points.indexOf(point)));
  made.cross.setAttribute('x2', x(points.indexOf(point)));
  say(made.value, made.hover == null ? made.show(point) : `${clock(point.at * 1000)}: ${made.show(point)}`);
  say(made.most, highest ? `most ${made.lines.length > 1 ? ms(highest) : made.title.startsWith('Errors') ? percent(highest) : `${rate(highest)}/s`}` : '');
  made.svg.setAttribute('aria-label', `${made.title}: now ${made.show(points.at(-1))}`);
}

export function curve(all) {
  points = all;
  charts.forEach(draw);
}

export function update(point) {
  if (!point || points.at(-1)?.at === point.at) return;
  points.push(point);
  if (points.length > POINTS) points.shift();
  charts.forEach(draw);
}
