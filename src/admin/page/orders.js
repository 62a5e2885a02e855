// Evacuating and restoring regions.

import { $, say } from './dom.js';

/** Changes something. The header is one that no other site's page can send. */
export function post(path, body) {
  return fetch(path, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json', 'X-Portolan-Action': '1' },
    body: JSON.stringify(body),
  });
}

let asked;

/** Asks before it does anything. */
export function ask(action, region) {
  asked = { action, region };
  const evacuates = action === 'evacuate';
  say($('#order-title'), `${evacuates ? 'Evacuate' : 'Restore'} ${region}?`);
  say($('#order-text'), evacuates ? 'Its traffic goes to the next regions of every route, and comes back by itself.' : 'Its traffic comes back as it left.');
  say($('#order-go'), evacuates ? 'Evacuate' : 'Restore');
  $('#order-go').classList.toggle('danger', evacuates);
  $('#order-evacuate').hidden = !evacuates;
  $('#order-force').hidden = true;
  $('#order-form').reset();
  say($('#order-error'), '');
  $('#order').showModal();
  $('#order-form').elements.reason.focus();
}

async function carryOut(event) {
  event.preventDefault();
  const order = asked;
  const { action, region } = order;
  const form = $('#order-form').elements;
  const body = { reason: form.reason.value };
  if (action === 'evacuate') Object.assign(body, { for: form.for.value, ramp: form.ramp.value, force: form.force.checked });
  $('#order-go').disabled = true;
  try {
    const answer = await post(`/regions/${encodeURIComponent(region)}/${action}`, body);
    const said = await answer.json().catch(() => ({ error: `status ${answer.status}` }));
    // Meanwhile somebody may be asked about another region.
    if (order !== asked) return;
    if (answer.ok) {
      say($('#order-note'), said.survives_restart === false ? `Without \`state_dir\` a restart forgets the order for ${region}.` : '');
      $('#order').close();
    } else {
      say($('#order-error'), said.error);
      // It would leave somebody without a region: that has to be said twice.
      if (answer.status === 409) $('#order-force').hidden = false;
    }
  } catch (error) {
    say($('#order-error'), String(error));
  } finally {
    $('#order-go').disabled = false;
  }
}

export function build() {
  $('#order-form').addEventListener('submit', carryOut);
  $('#order-cancel').addEventListener('click', () => $('#order').close());
}
