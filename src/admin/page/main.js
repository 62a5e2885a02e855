// Listens to the process and hands what it tells to the parts of the page.

import * as charts from './charts.js';
import { $, h } from './dom.js';
import * as explain from './explain.js';
import * as map from './map.js';
import * as orders from './orders.js';
import * as tables from './tables.js';
import * as tail from './tail.js';

let stream;

function routes({ route_names: names, map_route: shown }) {
  const select = $('#map-route');
  const sorted = [...names].sort().slice(0, 500);
  if ([...select.options].map((option) => option.value).join() !== sorted.join()) {
    select.replaceChildren(...sorted.map((name) => h('option', {}, name)));
    select.value = shown;
  }
  select.parentElement.hidden = sorted.length < 2;
}

function now(event) {
  const told = JSON.parse(event.data);
  $('#lost').hidden = true;
  tables.reload(told);
  // Nobody looks: the curves go on, the rest waits.
  charts.update(told.point);
  if (document.hidden) return;
  routes(told);
  tables.figures(told);
  map.update(told);
  tables.regions(told);
  tables.traffic(told);
  tables.events(told);
  explain.update(told);
  tail.update(told);
  document.body.dataset.live = 'yes';
}

function listen() {
  stream?.close();
  const asked = tail.wanted();
  if ($('#map-route').dataset.chosen) asked.set('map', $('#map-route').value);
  stream = new EventSource(`/events?${asked}`);
  stream.addEventListener('curve', (event) => charts.curve(JSON.parse(event.data)));
  stream.addEventListener('now', now);
  stream.addEventListener('requests', (event) => tail.requests(JSON.parse(event.data)));
  stream.addEventListener('error', () => {
    $('#lost').hidden = false;
    // What was refused (a filter that cannot be) does not come back by itself.
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
  });
}

charts.build();
orders.build();
explain.build();
tail.build(listen);
$('#map-route').addEventListener('change', (event) => {
  event.target.dataset.chosen = 'yes';
  listen();
});
listen();
map.build();
