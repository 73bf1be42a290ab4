//! Numbers instead of pointers: what JavaScript holds of a native object. A number is a slot and its generation, so a
//! stale one never reaches another object.

use std::sync::{Arc, PoisonError, RwLock};

const SLOT_BITS: u32 = 24;

struct Slot<T> {
    generation: u64,
    value: Option<Arc<T>>,
    /// The environment that made it, which ends it.
    env: usize,
}

/// Objects of one kind, of all environments of the process.
pub(crate) struct Slots<T> {
    slots: RwLock<Vec<Slot<T>>>,
}

impl<T> Slots<T> {
    pub(crate) const fn new() -> Self {
        Self { slots: RwLock::new(Vec::new()) }
    }

    pub(crate) fn insert(&self, value: Arc<T>, env: usize) -> f64 {
        // Only whole slots are written under the lock.
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let index = match slots.iter().position(|slot| slot.value.is_none()) {
            Some(free) => free,
            None => {
                slots.push(Slot { generation: 0, value: None, env });
                slots.len() - 1
            }
        };
        let Some(slot) = slots.get_mut(index) else { return -1.0 };
        slot.generation += 1;
        slot.value = Some(value);
        slot.env = env;
        (slot.generation << SLOT_BITS | index as u64) as f64
    }

    pub(crate) fn get(&self, handle: f64) -> Option<Arc<T>> {
        let (generation, index) = parts(handle);
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.get(index).filter(|slot| slot.generation == generation)?.value.clone()
    }

    pub(crate) fn remove(&self, handle: f64) -> Option<Arc<T>> {
        let (generation, index) = parts(handle);
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots.get_mut(index).filter(|slot| slot.generation == generation)?.value.take()
    }

    /// Takes the object itself out, if this is its only name; otherwise it stays, and here is another name.
    pub(crate) fn take(&self, handle: f64) -> Option<Result<T, Arc<T>>> {
        let (generation, index) = parts(handle);
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let slot = slots.get_mut(index).filter(|slot| slot.generation == generation)?;
        let taken = Arc::try_unwrap(slot.value.take()?);
        slot.value = taken.as_ref().err().map(Arc::clone);
        Some(taken)
    }

    /// All there are.
    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.iter().filter_map(|slot| slot.value.clone()).collect()
    }

    /// Takes out all of an environment that ends.
    pub(crate) fn remove_of(&self, env: usize) -> Vec<Arc<T>> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots.iter_mut().filter(|slot| slot.env == env).filter_map(|slot| slot.value.take()).collect()
    }
}

fn parts(handle: f64) -> (u64, usize) {
    let number = handle as u64;
    (number >> SLOT_BITS, (number & ((1 << SLOT_BITS) - 1)) as usize)
}
