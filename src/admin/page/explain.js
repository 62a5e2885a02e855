// What would happen to a request, step by step.

import { $, h, keyed, percent } from './dom.js';
import { post } from './orders.js';

export function build() {
  $('#explain-form').addEventListener('submit', (event) => {
    event.preventDefault();
    explain();
  });
}

/** Regions to take for unreachable. */
export function update(now) {
  keyed(
    $('#down'),
    now.regions,
    ({ name }) => name,
    ({ name }) => h('label', {}, h('input', { type: 'checkbox', name: 'down', value: name }), ' ', name),
    () => {},
  );
}

/** Asks about a request that was seen. */
export function askAbout({ client, method, host, path }) {
  const form = $('#explain-form').elements;
  form.ip.value = client;
  form.method.value = method;
  form.url.value = host ? `http://${host}${path}` : path;
  $('#explain').scrollIntoView();
  explain();
}

async function explain() {
  const form = new FormData($('#explain-form'));
  const lines = form.get('headers').split('\n').map((line) => line.trim()).filter(Boolean);
  const headers = lines.map((line) => {
    const colon = line.indexOf(':');
    return colon < 0 ? [line, ''] : [line.slice(0, colon).trim(), line.slice(colon + 1).trim()];
  });
  const question = { ip: form.get('ip').trim(), method: form.get('method').trim() || 'GET', url: form.get('url').trim(), headers, down: form.getAll('down') };
  const place = $('#explained');
  try {
    const answer = await post('/explain', question);
    const text = await answer.text();
    if (answer.ok) place.replaceChildren(journey(JSON.parse(text)));
    else place.replaceChildren(h('p', { class: 'bad' }, readable(text)));
  } catch (error) {
    place.replaceChildren(h('p', { class: 'bad' }, String(error)));
  }
}

function readable(text) {
  try {
    return JSON.parse(text).error ?? text;
  } catch {
    return text;
  }
}

const step = (title, what, ...because) =>
  h('li', {}, h('span', { class: 'step' }, title), h('div', {}, h('b', {}, what), because.flat().filter(Boolean).map((why) => (why instanceof Node ? why : h('div', { class: 'quiet' }, why)))));

const list = (items) => h('ul', {}, items.map((item) => h('li', {}, item)));

function rules(all) {
  return all.map((rule) => {
    const saw = (rule.saw ?? []).map(({ operand, value }) => `${operand} is ${value ?? 'missing'}`).join(', ');
    return `${rule.id ?? rule.name}: ${rule.applies === false ? 'does not apply' : rule.action ?? 'applies'}${saw ? ` (${saw})` : ''}`;
  });
}

/** The journey as a list. What the answer has and this does not know is shown as it is. */
function journey(e) {
  const steps = [];
  const { request, client, country, route } = e;
  steps.push(step('Request', `${request.method} ${request.host}${request.path}`, request.seen_as && `routes and rules see the path ${request.seen_as}`));
  steps.push(step('Client', client.ip, client.because));
  steps.push(step('Country', country.subdivision ?? country.code, `${country.result}${country.database ? ` in ${country.database}` : ''}`));
  steps.push(route ? step('Route', route.name, route.because, route.beat.map(({ name, because }) => `rather than ${name}: ${because}`)) : step('Route', 'none', 'no route matches'));
  if (e.class) steps.push(step('Importance', e.class));
  if (e.conditions?.length) steps.push(step('Conditions', `${e.conditions.length} looked at`, list(rules(e.conditions))));
  const asked = e.firewall?.rules ?? [];
  if (asked.length) steps.push(step('Rules', `${asked.length} asked`, list(rules(asked))));
  if (e.limits?.length) steps.push(step('Limits', `${e.limits.length} asked`, list(e.limits.map(limit))));
  if (e.cache) steps.push(step('Cache', e.cache.status ?? e.cache.verdict ?? 'asked', details(e.cache)));
  if (e.transforms) steps.push(step('Transforms', 'change the request', details(e.transforms)));
  if (e.regions.length) {
    const one = ({ name, because, share, upstreams, inside }) =>
      h('li', {}, h('b', {}, name), ` begins ${percent(share, 0)} of such requests`, h('div', { class: 'quiet' }, `${because}; inside ${inside}`), upstreams.map(({ url, state }) => h('div', { class: 'quiet' }, h('code', {}, url), ` ${state}`)));
    steps.push(step('Regions', 'in this order', h('ol', {}, e.regions.map(one))));
  }
  if (e.moved) steps.push(step('Moved', `away from ${e.moved.region}`, e.moved.because));
  if (e.patience) {
    const { connect, silence, total, attempts, repeat, budget } = e.patience;
    steps.push(step('Patience', `connect ${connect}, silence ${silence}, total ${total}`, `at most ${attempts} attempts; sent again? ${repeat}`, `retry budget: ${budget}`));
  }
  if (e.attempts.length) steps.push(step('Attempts', `${e.attempts.length}`, h('ol', {}, e.attempts.map(({ region, upstream, outcome }) => h('li', {}, `${region} `, h('code', {}, upstream), `: ${outcome}`)))));
  const { answer } = e;
  steps.push(step('Answer', answer.text, answer.status && `status ${answer.status}`));
  steps.at(-1).classList.add('answer');
  return h('ol', { class: 'journey' }, steps);
}

const limit = ({ id, limit: name, decision, outcome, because, text, used, quota }) => [id ?? name, decision ?? outcome, because ?? text, used != null && `${used} of ${quota}`].filter(Boolean).join(': ');

/** Whatever an object says, as a list. */
function details(value) {
  const shown = Object.entries(value).filter(([, v]) => v != null && v !== '' && !(Array.isArray(v) && !v.length));
  return list(shown.map(([name, v]) => `${name.replaceAll('_', ' ')}: ${typeof v === 'object' ? JSON.stringify(v) : v}`));
}
