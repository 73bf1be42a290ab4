// Looks at the report page in a browser: `look.mjs PAGE SCREENSHOT-FOLDER PACKAGES`, run by the Node and with the packages that
// `browser.mjs` has installed. Prints what it has seen as JSON.

import { createRequire } from 'node:module';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

const [page, folder, packages] = process.argv.slice(2);
// The browser's own libraries, too: the machine need not have a desktop's.
process.env.AWS_LAMBDA_JS_RUNTIME = 'nodejs22.x';
const load = async name => import(pathToFileURL(createRequire(join(packages, 'x.js')).resolve(name)).href);
const { default: chromium } = await load('@sparticuz/chromium');
const { default: puppeteer } = await load('puppeteer-core');

/** What is on the page; runs in it. */
function read() {
  const shown = element => {
    const { x, y, width, height } = element.getBoundingClientRect();
    return { x, y, width, height };
  };
  const colour = (element, name) => {
    const style = getComputedStyle(element).getPropertyValue(name);
    return style.match(/[\d.]+/g).map(Number);
  };
  const luminance = rgb => {
    const [r, g, b] = rgb.map(part =>
      part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4,
    );
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = element => {
    const [a, b] = [colour(element, 'color'), colour(document.body, 'background-color')].map(luminance);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  return {
    width: document.documentElement.clientWidth,
    scrollWidth: document.documentElement.scrollWidth,
    background: colour(document.body, 'background-color'),
    contrasts: ['body', 'p', 'dt', 'dd', 'h2'].map(name => contrast(document.querySelector(name))),
    facts: Object.fromEntries(
      [...document.querySelectorAll('dl div')].map(row => [
        row.querySelector('dt').textContent,
        row.querySelector('dd').textContent,
      ]),
    ),
    drawings: [...document.querySelectorAll('svg')].map(svg => ({
      ...shown(svg),
      name: svg.getAttribute('aria-label'),
      cells: [...svg.querySelectorAll('rect:has(title)')].map(cell => ({
        ...shown(cell),
        title: cell.querySelector('title').textContent,
      })),
      texts: [...svg.querySelectorAll('text')].map(text => ({ ...shown(text), text: text.textContent })),
    })),
    figures: JSON.parse(document.querySelector('#figures').textContent),
  };
}

const browser = await puppeteer.launch({
  executablePath: await chromium.executablePath(),
  args: [...chromium.args, '--no-sandbox'],
  headless: 'shell',
});
const tab = await browser.newPage();
const troubles = [];
const requests = [];
tab.on('console', message => troubles.push(message.text()));
tab.on('pageerror', error => troubles.push(String(error)));
tab.on('request', request => requests.push(request.url()));
const views = {};
for (const [name, width, scheme] of [
  ['desktop', 1200, 'light'],
  ['dark', 1200, 'dark'],
  ['phone', 375, 'light'],
  ['phone, dark', 375, 'dark'],
]) {
  await tab.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }]);
  await tab.setViewport({ width, height: 800 });
  await tab.goto(pathToFileURL(page).href);
  views[name] = await tab.evaluate(read);
  await tab.screenshot({ path: join(folder, `${name.replace(', ', '-')}.png`), fullPage: true });
}
await browser.close();
process.stdout.write(JSON.stringify({ views, troubles, requests }));
