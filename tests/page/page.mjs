// What a person does with the page, in a real browser. `node page.mjs ADMIN CONFIG PICTURES`: the demo's admin address, its
// configuration, and a folder for pictures. Ends with 0, or says what went wrong.

import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { readFile, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { chromium } from 'playwright-core';

const [admin, config, pictures] = process.argv.slice(2);
const axe = await readFile(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');
const said = [];

const quiet = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'];
const browser = await chromium.launch({ executablePath: execFileSync('which', ['chromium'], { encoding: 'utf8' }).trim(), args: quiet });

async function open(options) {
  const page = await (await browser.newContext(options)).newPage();
  page.setDefaultTimeout(60_000);
  page.on('console', (message) => ['error', 'warning'].includes(message.type()) && said.push(`${message.type()}: ${message.text()}`));
  page.on('pageerror', (error) => said.push(`error: ${error.message}`));
  page.on('request', (request) => new URL(request.url()).origin !== admin && said.push(`elsewhere: ${request.url()}`));
  await page.goto(admin);
  await page.waitForSelector('body[data-live]');
  await page.waitForSelector('[data-country=GB]');
  return page;
}

async function accessible(page, when) {
  await page.evaluate(axe);
  // Rows that come and go while they are looked at are told of as gone.
  await page.evaluate(() => window.scrollTo(0, 0));
  const { violations } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ['violations'] }));
  const told = violations.map(({ id, help, nodes }) => `${id}: ${help}: ${nodes.map((node) => node.target.join(' ')).slice(0, 5).join(', ')}`);
  assert.deepEqual(told, [], `accessibility, ${when}`);
}

const demo = (what, region) => fetch(`${admin}/_demo/${what}/${region}`, { method: 'POST' });
const serves = (page, country, region) => page.waitForSelector(`[data-country=${country}][data-region=${region}]`, { state: 'attached' });

const light = await open({ viewport: { width: 1280, height: 900 }, colorScheme: 'light' });
await serves(light, 'GB', 'eu_west');
await serves(light, 'JP', 'ap_northeast');
assert.match(await light.getAttribute('#map svg', 'aria-label'), /us_east serves \d+ countries/);
await light.waitForSelector('#tail tbody tr');
assert.notEqual(await light.textContent('#figures dd'), '0/s');
await accessible(light, 'light');

// A region fails: the map recolours, an arc shows where its people went, and everything says why.
await demo('fail', 'eu_west');
await serves(light, 'GB', 'us_east');
await light.waitForSelector('.arcs path[data-from=eu_west][data-to=us_east]', { state: 'attached' });
await light.waitForSelector('#region-table tr[data-state=unhealthy]');
assert.match(await light.textContent('#region-table tr[data-state=unhealthy]'), /eu_west.*ejected: ejection number/s);
await light.waitForSelector('#events .unhealthy');
await light.waitForSelector('#events .failover');
await light.waitForTimeout(1500); // for the picture: the curves of a few seconds
await light.screenshot({ path: `${pictures}/page-light.png` });

const dark = await open({ viewport: { width: 1280, height: 900 }, colorScheme: 'dark' });
await serves(dark, 'GB', 'us_east');
await accessible(dark, 'dark');
await dark.screenshot({ path: `${pictures}/page-dark.png` });
await dark.context().close();

const phone = await open({ viewport: { width: 390, height: 844 }, deviceScaleFactor: 2, isMobile: true, hasTouch: true, colorScheme: 'light' });
await serves(phone, 'GB', 'us_east');
assert.ok((await phone.evaluate(() => document.documentElement.scrollWidth)) <= 390, 'nothing is wider than a phone');
await accessible(phone, 'phone');
await phone.screenshot({ path: `${pictures}/page-phone.png` });
await phone.context().close();

await demo('restore', 'eu_west');
await serves(light, 'GB', 'eu_west');
await light.waitForSelector('#events .healthy');

// An operator evacuates a region, and brings it back. Escape does nothing.
await light.click('[aria-label="Evacuate sa_east"]');
await light.keyboard.press('Escape');
await light.waitForSelector('#order', { state: 'hidden' });
await light.click('[aria-label="Evacuate sa_east"]');
await accessible(light, 'dialog');
await light.keyboard.type('power work');
await light.selectOption('#order-form [name=for]', '15m');
await light.keyboard.press('Enter');
await light.waitForSelector('#order', { state: 'hidden' });
await light.waitForSelector('#region-table tr[data-key=sa_east][data-state=evacuated]');
assert.match(await light.textContent('#region-table tr[data-key=sa_east]'), /until \d\d:\d\d:\d\d, keeps 0 %: power work/);
await serves(light, 'BR', 'us_east');
await light.click('[aria-label="Restore sa_east"]');
await light.click('#order-go');
await serves(light, 'BR', 'sa_east');
await light.waitForSelector('#region-table tr[data-key=sa_east][data-state=healthy]');

// What would leave somebody without a region is refused, and says so.
for (const region of ['us_east', 'ap_northeast', 'ap_southeast', 'sa_east']) {
  await light.click(`[aria-label="Evacuate ${region}"]`);
  await light.click('#order-go');
  await light.waitForSelector(`#region-table tr[data-key=${region}][data-state=evacuated]`);
}
await light.click('[aria-label="Evacuate eu_west"]');
await light.click('#order-go');
await light.waitForSelector('#order-force:not([hidden])');
assert.match(await light.textContent('#order-error'), /no healthy region would be left/);
said.splice(0, said.length, ...said.filter((line) => !line.includes('409'))); // the browser tells of the refusal, too
await light.click('#order-cancel');

// Explain: why, and what if.
await light.fill('#explain-form [name=ip]', '81.2.69.160');
await light.check('#down [value=eu_west]');
await light.press('#explain-form [name=url]', 'Enter');
await light.waitForSelector('.journey .answer');
const journey = await light.textContent('.journey');
for (const part of ['GB', 'steering.countries.GB names it', 'down (assumed)', 'evacuated: keeps 0 %', 'connect_refused']) {
  assert.ok(journey.includes(part), `${part} is not in ${journey}`);
}
await accessible(light, 'explained');
await light.fill('#explain-form [name=ip]', 'nonsense');
await light.press('#explain-form [name=url]', 'Enter');
await light.waitForSelector('#explained .bad');
said.splice(0, said.length, ...said.filter((line) => !/ 4(00|22) /.test(line)));

// The list of requests: filtered by the process, paused, and asked about.
await light.fill('#filter [name=country]', 'US');
await light.waitForFunction(() => {
  const rows = [...document.querySelectorAll('#tail tbody tr')];
  return rows.length > 3 && rows.every((row) => row.children[1].textContent.endsWith('US'));
});
// An address that is half typed is refused: the list says so, and nothing else stops.
await light.fill('#filter [name=ip]', '81.2');
await light.waitForFunction(() => document.querySelector('#tail-trouble').textContent.includes('`81.2` is no address'));
said.splice(0, said.length, ...said.filter((line) => !line.includes(' 400 ')));
const before = await light.textContent('#about');
await light.waitForFunction((old) => document.querySelector('#about').textContent !== old, before);
assert.equal(await light.isHidden('#lost'), true);
await light.fill('#filter [name=ip]', '');
await light.waitForFunction(() => !document.querySelector('#tail-trouble').textContent);
await light.waitForSelector('#tail tbody tr');
// Paused it stays as it is; a beat of the figures is time enough for rows to come.
await light.click('#pause');
const rows = await light.textContent('#tail tbody');
const pausedAt = await light.textContent('#about');
await light.waitForFunction((old) => document.querySelector('#about').textContent !== old, pausedAt);
assert.equal(await light.textContent('#tail tbody'), rows);
assert.match(await light.textContent('#tail-note'), /paused/);
await light.click('#tail tbody tr:first-child .link');
await light.waitForFunction(() => document.querySelector('.journey')?.textContent.includes('US'));

// A configuration that is refused: a banner with the exact problem, until it is mended.
const good = await readFile(config, 'utf8');
await writeFile(config, good.replace('default: us_east', 'default: us_eats'));
await light.waitForSelector('#reload:not([hidden])');
assert.match(await light.textContent('#reload'), /was refused.*demo\.yaml:\d+:\d+.*region `us_eats` is not defined.*did you mean `us_east`/s);
await accessible(light, 'banner');
await writeFile(config, good);
await light.waitForSelector('#reload', { state: 'hidden' });

// A second route, with as long a name as there can be: the map shows either, and everything fits the narrowest phone.
const long = 'r'.repeat(64);
await fetch(`${admin}/regions/sa_east/restore`, { method: 'POST' });
await writeFile(config, good.replace('routes:\n', `routes:\n  - { name: ${long}, hosts: [long.example], steering: { default: sa_east } }\n`));
await light.waitForSelector(`#map-route option:text("${long}")`, { state: 'attached' });
await light.selectOption('#map-route', long);
await serves(light, 'GB', 'sa_east');
assert.match(await light.textContent('#served-by'), new RegExp(long));
await light.setViewportSize({ width: 320, height: 700 });
assert.ok((await light.evaluate(() => document.documentElement.scrollWidth)) <= 320, 'nothing is wider than the narrowest phone');
// The map for those who do not see it.
await light.click('#everybody summary');
await light.waitForFunction(() => [...document.querySelectorAll('#everybody tbody tr')].some((row) => row.textContent.includes('United Kingdom (GB)sa_east')));
await accessible(light, 'narrow');
await writeFile(config, good);
await serves(light, 'GB', 'eu_west');
await light.setViewportSize({ width: 1280, height: 900 });

// With the keyboard alone: the first stop leads past the header.
await light.reload();
await light.waitForSelector('body[data-live]');
await light.keyboard.press('Tab');
assert.equal(await light.evaluate(() => document.activeElement.className), 'skip');
await light.keyboard.press('Enter');
assert.equal(await light.evaluate(() => document.activeElement.id), 'main');

await light.close();
await browser.close();
assert.deepEqual(said, [], 'the console is quiet, and nothing is asked for elsewhere');
