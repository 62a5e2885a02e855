// Makes world.json, the map of the admin page. In a copy of this folder, so that no node_modules is left here:
//   npm install world-atlas@2.0.2 topojson-client@3 i18n-iso-countries@7 && node build.mjs
import { writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import iso from "i18n-iso-countries";
import { merge } from "topojson-client";

const require = createRequire(import.meta.url);
const WIDTH = 1000;
const HEIGHT = 500;
const SMALLEST = 0.3; // px²; a smaller ring is left out, unless it is a main part of its country

// Natural Earth gives these no number.
const UNNUMBERED = { Kosovo: "XK", "N. Cyprus": "CY", Somaliland: "SO", "Indian Ocean Ter.": "AU" };

// Places with a code of their own that Natural Earth counts to a country: [country, west, south, east, north].
const PARTS = {
  BQ: ["NL", -69, 12, -62.9, 18],
  BV: ["NO", 3, -55, 4, -54],
  CC: ["AU", 96, -13, 98, -12],
  CX: ["AU", 105, -11, 106, -10],
  GF: ["FR", -55, 2, -51, 6],
  GP: ["FR", -62, 15.5, -60.9, 17],
  MQ: ["FR", -62, 14, -60.5, 15],
  RE: ["FR", 55, -22, 56, -20],
  SJ: ["NO", 10, 74, 35, 81],
  TK: ["NZ", -173, -10, -171, -8],
  YT: ["FR", 45, -13, 45.5, -12],
};

function codeOf(country, polygon) {
  const within = ([, west, south, east, north]) =>
    polygon[0].every(([lon, lat]) => lon >= west && lon <= east && lat >= south && lat <= north);
  const part = Object.entries(PARTS).find(([, box]) => box[0] === country && within(box));
  return part ? part[0] : country;
}

// Each country's rings, in degrees, from the coarsest scale that has it.
function readRings() {
  const rings = new Map();
  for (const scale of ["110m", "50m", "10m"]) {
    const topology = require(`world-atlas/countries-${scale}.json`);
    const shapes = {};
    for (const shape of topology.objects.countries.geometries) {
      const country = shape.id ? iso.numericToAlpha2(shape.id) : UNNUMBERED[shape.properties.name];
      if (country) (shapes[country] ??= []).push(shape);
    }
    const found = {};
    for (const country in shapes) {
      for (const polygon of merge(topology, shapes[country]).coordinates) {
        (found[codeOf(country, polygon)] ??= []).push(...polygon);
      }
    }
    for (const code in found) if (!rings.has(code)) rings.set(code, found[code]);
  }
  return rings;
}

// Follows a ring over the 180th meridian, past the map's edge; one that goes round a pole is closed along it.
function unwrap(ring) {
  const out = [ring[0]];
  for (const [lon, lat] of ring.slice(1)) {
    const before = out.at(-1)[0];
    out.push([lon - 360 * Math.round((lon - before) / 360), lat]);
  }
  const [first, last] = [out[0], out.at(-1)];
  if (Math.abs(last[0] - first[0]) > 180) {
    const pole = first[1] < 0 ? -90 : 90;
    out.push([last[0], pole], [first[0], pole]);
  }
  return out;
}

// The part of a ring on one side of the map's edge (Sutherland and Hodgman's way).
function clip(ring, edge, inside) {
  return ring.flatMap((to, i) => {
    const from = ring.at(i - 1);
    const kept = inside(to[0]) ? [to] : [];
    if (inside(from[0]) === inside(to[0])) return kept;
    const share = (edge - from[0]) / (to[0] - from[0]);
    return [[edge, from[1] + share * (to[1] - from[1])], ...kept];
  });
}

const cut = (ring) =>
  [-360, 0, 360].map((turn) => {
    const turned = unwrap(ring).map(([lon, lat]) => [lon + turn, lat]);
    return clip(clip(turned, 180, (lon) => lon <= 180), -180, (lon) => lon >= -180);
  });

const project = ([lon, lat]) => [((lon + 180) / 360) * WIDTH, ((90 - lat) / 180) * HEIGHT];

const area = (ring) =>
  Math.abs(ring.reduce((sum, [x, y], i) => sum + ring.at(i - 1)[0] * y - x * ring.at(i - 1)[1], 0)) / 2;

function draw(ring, decimals) {
  const scale = 10 ** decimals;
  const points = ring.map(([x, y]) => [Math.round(x * scale), Math.round(y * scale)]);
  const bends = points.filter(([x, y], i) => x !== points.at(i - 1)[0] || y !== points.at(i - 1)[1]);
  const steps = bends.map(([x, y], i) => (i === 0 ? [x, y] : [x - bends[i - 1][0], y - bends[i - 1][1]]));
  const numbers = (step) => step.map((n) => String(n / scale).replace(/^(-?)0\./, "$1."));
  const line = steps.slice(1).flatMap(numbers).join(" ").replaceAll(" -", "-");
  return `M${numbers(steps[0]).join(" ")}l${line}z`;
}

function path(rings) {
  const drawn = rings.flatMap(cut).map((ring) => ring.map(project)).filter((ring) => area(ring) > 0);
  const largest = Math.max(...drawn.map(area));
  const decimals = largest > 3 ? 1 : largest > 0.005 ? 2 : 3;
  const smallest = Math.min(SMALLEST, largest / 5);
  return drawn.filter((ring) => area(ring) >= smallest).map((ring) => draw(ring, decimals)).join("");
}

const countries = [...readRings()].sort(([a], [b]) => (a < b ? -1 : 1));
const lines = countries.map(([code, rings]) => `    "${code}": "${path(rings)}"`);
const json = `{\n  "width": ${WIDTH},\n  "height": ${HEIGHT},\n  "countries": {\n${lines.join(",\n")}\n  }\n}\n`;
writeFileSync(new URL("world.json", import.meta.url), json);
