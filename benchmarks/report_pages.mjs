// Opens reports in Chromium: no message on the console, no request, no page wider than the window, no finding of
// axe-core, in both color schemes at three widths, folded and unfolded; prints the stops of the Tab key.
//
//   npm install --prefix FOLDER axe-core puppeteer-core
//   node benchmarks/report_pages.mjs FOLDER SCREENSHOTS RUN/report.html ...
//
// Screenshots go to the folder SCREENSHOTS. The exit code is 1 if anything was found.
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const [modules, screenshots, ...reports] = process.argv.slice(2).map((name) => path.resolve(name));
const find = createRequire(path.join(modules, "package.json"));
const { default: puppeteer } = await import(find.resolve("puppeteer-core"));
const axe = fs.readFileSync(find.resolve("axe-core/axe.min.js"), "utf8");

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: ["--no-sandbox", "--disable-gpu"],
});
fs.mkdirSync(screenshots, { recursive: true });
let found = 0;
for (const report of reports) {
  for (const scheme of ["light", "dark"]) {
    for (const width of [390, 800, 1400]) found += await check(report, scheme, width);
  }
}
await browser.close();
process.exit(found ? 1 : 0);

async function check(report, scheme, width) {
  const problems = [], page = await browser.newPage(), name = `${path.basename(path.dirname(report))}-${width}-${scheme}`;
  page.on("console", (message) => problems.push(`console: ${message.text()}`));
  page.on("pageerror", (error) => problems.push(`error: ${error.message}`));
  page.on("request", (request) => {
    if (request.url() !== `file://${report}` && !request.url().startsWith("data:")) problems.push(`request: ${request.url()}`);
  });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.setViewport({ width, height: 900 });
  await page.goto(`file://${report}`);
  for (const state of ["folded", "unfolded"]) {
    if (state === "unfolded") {
      if (width === 1400 && scheme === "light") console.log(`  Tab: ${(await stops(page)).join(" | ")}`);
      await page.evaluate(() => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
    }
    const [wider, height] = await page.evaluate(() => [document.documentElement.scrollWidth - innerWidth, document.body.scrollHeight]);
    if (wider > 0) problems.push(`${state}: ${wider} pixels wider than the window`);
    const clip = { x: 0, y: 0, width, height: Math.min(height, 16000) };  // Chromium draws no taller ones
    await page.screenshot({ path: path.join(screenshots, `${name}-${state}.png`), clip, captureBeyondViewport: true });
    await page.evaluate(axe);  // the debugger is not bound by the policy of the page
    const { violations } = await page.evaluate(() => axe.run({ exclude: "#quality tbody tr:nth-child(n + 20)" }, { resultTypes: ["violations"] }));
    problems.push(...violations.map((one) => `${state}: axe ${one.impact}, ${one.id}: ${one.nodes.length} times, ${one.nodes[0].html.slice(0, 160)}`));
  }
  await page.close();
  console.log([name, ...(problems.length ? problems : ["nothing found"])].join("\n  "));
  return problems.length;
}

async function stops(page) {
  const names = [];
  for (let i = 0; i < 60; i++) {
    await page.keyboard.press("Tab");
    const name = await page.evaluate(() => {
      const at = document.activeElement;
      return at === document.body ? "" : (at.getAttribute("aria-label") || at.textContent).trim().slice(0, 40);
    });
    if (!name) break;
    names.push(name);
  }
  return names;
}
