// Figures, tables, and what happened.

import { $, NOTHING, bytes, clock, colourOf, count, countryName, h, keyed, ms, percent, rate, say, span } from './dom.js';
import { stateOf } from './map.js';
import { ask } from './orders.js';

export function figures(now) {
  const ten = now.traffic['10s'];
  const { cpus, cpus_available: available, resident_bytes: memory } = now.process;
  const all = [
    ['Requests', `${rate(ten.per_second)}/s`],
    ['Errors', percent(ten.error_ratio), ten.error_ratio > 0.01 && 'bad'],
    ['P50', ms(ten.p50_ms)],
    ['P95', ms(ten.p95_ms)],
    ['P99', ms(ten.p99_ms)],
    ['Connections', count(now.connections)],
    ['CPU', cpus == null ? '–' : `${percent(cpus / available, 0)} of ${available}`],
    ['Memory', memory == null ? '–' : bytes(memory)],
  ];
  keyed(
    $('#figures'),
    all,
    ([name]) => name,
    ([name]) => h('div', {}, h('dt', {}, name), h('dd', {})),
    (item, [, value, kind]) => {
      const shown = item.querySelector('dd');
      shown.className = kind || '';
      say(shown, value);
    },
  );
  const built = now.database_built ? `countries of ${now.database_built.slice(0, 10)}` : 'no country database';
  say($('#about'), `${now.version} · up ${span(now.uptime_seconds)} · configuration ${now.config.generation} · ${built}`);
}

export function reload({ config }) {
  const banner = $('#reload');
  banner.hidden = config.last_reload_successful;
  // Two may be refused within one second.
  const of = JSON.stringify([config.last_reload, config.problems]);
  if (config.last_reload_successful || banner.dataset.of === of) return;
  banner.dataset.of = of;
  const problem = ({ file, line, column, message, hint }) =>
    h('li', {}, file && h('code', {}, `${file}:${line}:${column}`), ' ', message, hint && h('span', { class: 'quiet' }, ` (${hint})`));
  banner.replaceChildren(
    h('p', {}, h('b', {}, `The configuration read at ${clock(Date.parse(config.last_reload))} was refused.`), ` The last good one, number ${config.generation}, goes on.`),
    h('ul', {}, config.problems.map(problem)),
  );
}

const cells = (row, ...texts) => texts.forEach((text, at) => text != null && say(row.children[at], text));

function upstreams(cell, region) {
  keyed(
    cell,
    region.upstreams,
    ({ url, address }) => `${url} ${address}`,
    ({ url }) => h('div', {}, h('span', { class: 'dot' }), ' ', h('code', {}, url), ' ', h('span', { class: 'quiet' })),
    (item, { address, url, state, because, check }) => {
      item.firstChild.className = `dot ${state === 'usable' || state === 'resting' ? 'good' : 'bad'}`;
      const place = address && !url.includes(address) ? `${address} ` : '';
      say(item.lastChild, `${place}${state.replace('_', ' ')}: ${because}${check ? `; health check ${check}` : ''}`);
    },
  );
}

export function regions(now) {
  keyed(
    $('#region-table tbody'),
    now.regions,
    ({ name }) => name,
    ({ name }) =>
      h(
        'tr',
        {},
        h('th', { scope: 'row' }, h('span', { class: 'swatch' }), name),
        h('td', {}, h('button', { type: 'button' }, 'Evacuate')),
        h('td', {}, h('span', { class: 'state' }), h('div', { class: 'quiet small why' })),
        ...['n', 'n', 'n', 'n', 'why'].map((kind) => h('td', { class: kind })),
      ),
    (row, region) => {
      row.className = colourOf(now.regions, region.name);
      const state = stateOf(region);
      row.dataset.state = state;
      const [word, note] = row.children[2].children;
      word.className = `state ${state}`;
      say(word, state);
      const { order } = region;
      const until = order?.until ? `until ${clock(order.until)}, ` : '';
      say(note, order ? `${until}keeps ${percent(region.granted, 0)}${order.reason ? `: ${order.reason}` : ''}` : '');
      const minute = region.traffic['1m'];
      cells(row, null, null, null, rate(minute.per_second), percent(minute.error_ratio), ms(minute.p95_ms), `${count(region.in_flight)}${region.waiting ? ` + ${region.waiting}` : ''}`);
      upstreams(row.children[7], region);
      const button = row.children[1].firstChild;
      say(button, order ? 'Restore' : 'Evacuate');
      button.setAttribute('aria-label', `${order ? 'Restore' : 'Evacuate'} ${region.name}`);
      button.onclick = () => ask(order ? 'restore' : 'evacuate', region.name);
    },
  );
}

/** A table of plain cells; `shown` are the texts of a row. */
function plain(selector, rows, key, kinds, shown, nothing) {
  const body = $(`${selector} tbody`);
  const nobody = rows.length ? [] : [null];
  keyed(
    body,
    [...rows, ...nobody],
    (row) => (row ? key(row) : NOTHING),
    (row) => h('tr', {}, row ? kinds.map((kind, at) => h(at ? 'td' : 'th', { class: kind, scope: at ? null : 'row' })) : h('td', { colspan: kinds.length, class: 'quiet' }, nothing)),
    (element, row) => row && cells(element, ...shown(row)),
  );
}

export function traffic(now) {
  const busy = now.routes.filter(({ traffic: t }) => t['5m'].requests).slice(0, 10);
  plain('#route-table', busy, ({ name }) => name, ['', 'n', 'n', 'n'], ({ name, traffic: { '1m': m } }) => [name, rate(m.per_second), percent(m.error_ratio), ms(m.p95_ms)], 'no requests yet');
  say($('#served-by'), now.route_names.length > 1 ? `Served by, for ${now.map_route}` : 'Served by');
  const countries = Object.entries(now.countries).filter(([, seen]) => seen.traffic);
  countries.sort((a, b) => b[1].traffic.per_second - a[1].traffic.per_second);
  plain('#country-table', countries.slice(0, 10), ([code]) => code, ['', 'name', 'n', 'n'], ([code, { region, traffic: t }]) => [`${countryName(code)} (${code})`, region ?? 'nobody', rate(t.per_second), ms(t.p95_ms)], 'no requests yet');
  const lately = (all) => all.slice(0, 10);
  plain('#failover-table', lately(now.failovers.filter(({ minute }) => minute)), (f) => `${f.from} ${f.to} ${f.reason}`, ['', '', '', 'n'], (f) => [f.from, f.to, f.reason, count(f.minute)], 'everybody is served at home');
  plain('#rule-table', lately(now.rules), (r) => `${r.rule} ${r.action}`, ['', '', 'n', 'n'], (r) => [r.rule, r.action, count(r.minute), count(r.total)], 'no rule applied yet');
  plain('#limit-table', lately(now.limits), (l) => `${l.limit} ${l.decision}`, ['', '', 'n', 'n'], (l) => [l.limit, l.decision, count(l.minute), count(l.total)], 'no limit applied yet');
  plain('#why-table', lately(now.unsuccessful), (w) => w.why, ['', 'n', 'n'], (w) => [w.why, count(w.minute), count(w.total)], 'every request was a success');
  cache(now);
}

/** Which of the cache's statuses spared the origin. */
const SPARED = ['hit', 'stale', 'stale_error', 'revalidated'];

function cache(now) {
  const all = now.cache_requests;
  plain('#cache-table', all, ({ status }) => status, ['', 'n', 'n'], (c) => [c.status, count(c.minute), count(c.total)], 'the cache was not asked yet');
  const sum = (list) => list.reduce((total, { minute }) => total + minute, 0);
  const [asked, spared] = [sum(all), sum(all.filter(({ status }) => SPARED.includes(status)))];
  const bar = $('#cache-bar');
  bar.hidden = !asked;
  if (!bar.firstChild) bar.append(h('div', {}, h('div', {})), h('span', { class: 'small' }));
  bar.firstChild.firstChild.style.width = `${asked ? (spared / asked) * 100 : 0}%`;
  say(bar.lastChild, asked ? `${percent(spared / asked)} spared the origin` : '');
  const { memory_bytes: memory, memory_objects: objects, disk_bytes: disk, disk_objects: files } = now.cache;
  say($('#cache-held'), `holds ${count(objects)} in memory (${bytes(memory)}), ${count(files)} on disk (${bytes(disk)})`);
}

const WORDS = {
  failover: (e) => `${count(e.requests)} ${e.requests === 1 ? 'request' : 'requests'} went to ${e.to}: ${e.because}`,
  unhealthy: (e) => `is unhealthy: ${e.because}`,
  healthy: (e) => `is healthy again: ${e.because}`,
  evacuated: (e) => `is evacuated${e.until ? ` until ${clock(e.until)}` : ''}${e.because ? `: ${e.because}` : ''}`,
  drained: (e) => `is drained${e.because ? `: ${e.because}` : ''}`,
  restored: (e) => `is restored (${e.because})`,
};

export function events(now) {
  const nothing = { kind: 'nothing' };
  keyed(
    $('#events'),
    now.events.length ? now.events.slice(0, 12) : [nothing],
    (e) => `${e.at} ${e.kind} ${e.region} ${e.to} ${e.because}`,
    (e) => h('li', { class: e.kind }, e.at && [h('time', {}, clock(e.at)), ' ', h('b', {}, e.region), ' '], h('span', {})),
    (item, e) => say(item.lastChild, e === nothing ? 'nothing yet' : (WORDS[e.kind]?.(e) ?? e.kind)),
  );
}
