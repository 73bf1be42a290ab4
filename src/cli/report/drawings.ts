/** Which drawings a report has, in their order. */

import { chartHeight, growthChart, missChart } from './charts.js';
import type { Figures } from './model.js';
import { heatMap, heights, histogram } from './svg.js';

/** A drawing. */
export interface Drawing {
  readonly name: string;
  /** What it shows, for who cannot see it. */
  readonly about: string;
  readonly content: string;
  readonly height: number;
}

/** That of late and missed faults is there where it is known what was replayed. */
export function drawingsOf(figures: Figures): Drawing[] {
  const { heat, imageSize, latencies, misses } = figures;
  const drawings = [
    {
      name: 'By place in the image and time',
      about: 'Faults by place in the image, upwards, and time',
      content: heatMap(heat, imageSize),
      height: heights.heat,
    },
    {
      name: 'Brought by faults over time',
      about: 'Bytes that faults had brought, each page counted once, over time',
      content: growthChart(figures),
      height: chartHeight,
    },
    {
      name: 'By latency',
      about: 'How many faults took how long',
      content: histogram(latencies),
      height: heights.bars,
    },
  ];
  if (misses === undefined) return drawings;
  const missed = {
    name: 'Late and missed over time',
    about: 'Faults on pages that were replayed, and on others, over time',
    content: missChart(misses, heat.duration),
    height: chartHeight,
  };
  return [...drawings.slice(0, 2), missed, ...drawings.slice(2)];
}
