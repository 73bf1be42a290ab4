import type { MemoryMapping } from './mapping.js';
import type { MemoryRange } from './range.js';

/** @hidden Memory whose faults are handled, as the addresses of a mapping. */
export interface FaultArea {
  readonly start: number;
  readonly end: number;
  readonly pageSize: number;
  readonly mapping: MemoryMapping;
}

/** @hidden The mappings that a handler's faults are in. */
export class FaultAreas {
  #areas: readonly FaultArea[] = [];
  /** The last one that was asked for: most have only one. */
  #last: FaultArea | undefined;

  /** In numbers, as the addon takes them. */
  set(areas: readonly FaultArea[]): number[] {
    this.#areas = areas;
    this.#last = undefined;
    return areas.flatMap(({ start, end, pageSize }) => [start, end - start, pageSize]);
  }

  at(address: number): FaultArea | undefined {
    const last = this.#last;
    if (last && address >= last.start && address < last.end) return last;
    const found = this.#areas.find(area => address >= area.start && address < area.end);
    if (found) this.#last = found;
    return found;
  }

  /** A range of a mapping where it lies in one of this process, else addresses. */
  rangeOf(start: number, end: number, own: boolean): MemoryRange {
    const area = this.at(start);
    if (!area || !own || end > area.end) return { address: BigInt(start), length: end - start };
    return { mapping: area.mapping, offset: start - area.start, length: end - start };
  }
}
