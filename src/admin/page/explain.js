// What would happen to a request, step by step.

import { $, h, keyed, percent, say } from './dom.js';
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
  form.headers.value = '';
  $('#explain-title').focus();
  $('#explain').scrollIntoView();
  explain();
}

let turn = 0;

async function explain() {
  // Answers may overtake each other.
  const mine = (turn += 1);
  const form = new FormData($('#explain-form'));
  const lines = form.get('headers').split('\n').map((line) => line.trim()).filter(Boolean);
  const headers = lines.map((line) => {
    const colon = line.indexOf(':');
    return colon < 0 ? [line, ''] : [line.slice(0, colon).trim(), line.slice(colon + 1).trim()];
  });
  const question = { ip: form.get('ip').trim(), method: form.get('method').trim().toUpperCase() || 'GET', url: form.get('url').trim(), headers, down: form.getAll('down') };
  const place = $('#explained');
  try {
    const answer = await post('/explain', question);
    const text = await answer.text();
    if (mine !== turn) return;
    say($('#explained-answer'), answer.ok ? JSON.parse(text).answer.text : readable(text));
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
    // What axum says of a body that it cannot read.
    return text.replace(/^Failed to deserialize the JSON body into the target type: /, '');
  }
}

const step = (title, what, ...because) =>
  h('li', {}, h('span', { class: 'step' }, title), h('div', {}, h('b', {}, what), because.flat().filter(Boolean).map((why) => (why instanceof Node ? why : h('div', { class: 'quiet' }, why)))));

const list = (items) => h('ul', {}, items.map((item) => h('li', {}, ...[item].flat())));

/** Rules as they stand, each with what it saw. */
const rules = (all) =>
  list(
    all.map(({ id, action, outcome, expression, operands }) => [
      h('b', {}, id),
      ` (${action}): ${outcome}`,
      h('div', { class: 'quiet' }, h('code', {}, expression)),
      operands.map(({ operand, value }) => h('div', { class: 'quiet' }, `${operand} is ${value ?? 'missing'}`)),
    ]),
  );

/** The journey as a list. */
function journey(e) {
  const steps = [];
  const { request, client, country, route, firewall, cache } = e;
  steps.push(step('Request', `${request.method} ${request.host}${request.path}`, request.seen_as && `routes and rules see the path ${request.seen_as}`));
  steps.push(step('Client', client.ip, client.because));
  steps.push(step('Country', country.subdivision ?? country.code, `${country.result}${country.database ? ` in ${country.database}` : ''}`));
  steps.push(route ? step('Route', route.name, route.because, route.beat.map(({ name, because }) => `rather than ${name}: ${because}`)) : step('Route', 'none', 'no route matches'));
  if (e.class) steps.push(step('Importance', e.class));
  if (e.conditions.length) steps.push(step('Conditions', `${e.conditions.length} asked`, rules(e.conditions)));
  if (firewall.rules.length) steps.push(step('Rules', `${firewall.rules.length} asked`, rules(firewall.rules), firewall.threat_score != null && `threat score ${firewall.threat_score} of 100`));
  if (e.limits.length) {
    const one = ({ id, action, quota, key, outcome }) => [h('b', {}, id), ` (${action}): ${outcome}`, h('div', { class: 'quiet' }, `${quota}${key ? ` for ${key}` : ''}`)];
    steps.push(step('Limits', `${e.limits.length} asked`, list(e.limits.map(one))));
  }
  if (firewall.managed) steps.push(step('Managed rules', firewall.managed));
  if (cache) steps.push(step('Cache', cache.outcome, cache.key && `key ${cache.key}`, cache.rules.length > 0 && `rules that apply: ${cache.rules.join(', ')}`, cache.response, cache.stored));
  if (e.transforms) steps.push(step('Changes', 'for the origin', e.transforms.target && `it gets ${e.transforms.target}`, e.transforms.headers));
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
  steps.push(step('Answer', answer.text, answer.status && !answer.text.startsWith(String(answer.status)) && `status ${answer.status}`));
  steps.at(-1).classList.add('answer');
  return h('ol', { class: 'journey' }, steps);
}
