// Listens to the process and hands what it tells to the parts of the page.

import * as charts from './charts.js';
import { $, h, say } from './dom.js';
import * as explain from './explain.js';
import * as map from './map.js';
import * as orders from './orders.js';
import { follow } from './stream.js';
import * as tables from './tables.js';
import * as tail from './tail.js';

/** A second without a word is late; so many are a connection that is lost without anybody having said so. */
const LATE = 5_000;
const LOST = 15_000;

const select = $('#map-route');
let heard = 0;
let version;

function banner(text) {
  // The text is set when it happens: a status that is only shown is not read out.
  say($('#lost'), text);
  $('#lost').hidden = !text;
  document.body.classList.toggle('old', Boolean(text));
}

function routes({ route_names: names, map_route: shown }) {
  const sorted = [...new Set([...names.slice(0, 500), shown ?? ''])].filter(Boolean).sort();
  if ([...select.options].map((option) => option.value).join() !== sorted.join()) select.replaceChildren(...sorted.map((name) => h('option', {}, name)));
  if (select.dataset.chosen && !names.includes(select.dataset.chosen)) delete select.dataset.chosen;
  // Unless somebody chose, it is the busiest one, and that changes.
  if (document.activeElement !== select || select.dataset.chosen) select.value = select.dataset.chosen ?? shown;
  select.parentElement.hidden = sorted.length < 2;
}

const parts = [routes, tables.figures, tables.reload, map.update, tables.regions, tables.traffic, tables.events, explain.update, tail.update];

function now(told) {
  heard = Date.now();
  banner('');
  // Another process has another page.
  version ??= told.version;
  if (version !== told.version) location.reload();
  charts.update(told.point);
  for (const part of parts) {
    try {
      part(told);
    } catch (error) {
      // One part must not stop the others.
      console.error(error);
    }
  }
  document.body.dataset.live = 'yes';
}

const state = follow(
  () => `/events${select.dataset.chosen ? `?${new URLSearchParams({ map: select.dataset.chosen })}` : ''}`,
  { curve: charts.curve, now },
  (why) => banner(why === 'lost' ? 'The connection is lost. Trying again …' : why && `The process does not tell: ${why}`),
);

function watch() {
  if (document.hidden) {
    // Whoever does not look keeps no place.
    state.close();
    tail.close();
  } else {
    heard = Date.now();
    state.open();
    tail.open();
  }
}

charts.build();
orders.build();
explain.build();
tail.build();
select.addEventListener('change', () => {
  select.dataset.chosen = select.value;
  state.open();
});
document.addEventListener('visibilitychange', watch);
setInterval(() => {
  if (document.hidden) return;
  const silent = Date.now() - heard;
  if (silent > LATE) banner('Nothing was heard for some seconds: what is shown is old.');
  if (silent > LOST) {
    heard = Date.now();
    state.open();
  }
}, 1000);
watch();
map.build();
