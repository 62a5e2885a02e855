// Does the page stay smooth? `node smooth.mjs ADMIN [SECONDS]`, before a process that is under load: tells how many frames
// there were, and the longest pauses between two.

import { execFileSync } from 'node:child_process';
import { chromium } from 'playwright-core';

const [admin, seconds = '20'] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath: execFileSync('which', ['chromium'], { encoding: 'utf8' }).trim(), args: ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking'] });
const page = await (await browser.newContext({ viewport: { width: 1280, height: 900 } })).newPage();
await page.goto(admin);
await page.waitForSelector('body[data-live]');
const told = await page.evaluate(
  (length) =>
    new Promise((done) => {
      const frames = [];
      const begin = performance.now();
      const step = (now) => {
        frames.push(now);
        if (now - begin < length) requestAnimationFrame(step);
        else done(frames.slice(1).map((frame, at) => frame - frames[at]));
      };
      requestAnimationFrame(step);
    }),
  Number(seconds) * 1000,
);
told.sort((a, b) => a - b);
const at = (part) => told[Math.floor((told.length - 1) * part)].toFixed(1);
console.log(`${(told.length / Number(seconds)).toFixed(1)} frames a second; ms between frames: P50 ${at(0.5)}, P95 ${at(0.95)}, P99 ${at(0.99)}, longest ${at(1)}`);
console.log(`requests shown: ${await page.textContent('#figures dd')}; heap ${((await page.evaluate(() => performance.memory.usedJSHeapSize)) / 2 ** 20).toFixed(1)} MiB`);
await browser.close();
