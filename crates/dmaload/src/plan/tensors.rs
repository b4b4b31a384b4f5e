//! The tensors of a file, and which of them are read.

use std::sync::Arc;

use super::select::{ChosenTensors, Rows, TensorSlice};
use crate::model::TensorMap;

/// The tensors of a file, and those that the load reads.
#[derive(Debug)]
pub(crate) struct FileTensors {
    pub(crate) map: Arc<TensorMap>,
    /// The tensors to read, in read order. `None` if all tensors are read, in file order.
    pub(crate) chosen: Option<Arc<ChosenTensors>>,
}

impl FileTensors {
    pub(crate) fn len(&self) -> usize {
        self.chosen.as_ref().map_or(self.map.len(), |chosen| chosen.list().len())
    }

    /// Returns the position in the map of the tensor with this number in read order.
    pub(crate) fn position_of(&self, number: usize) -> Option<usize> {
        match &self.chosen {
            Some(chosen) => chosen.list().get(number).map(|chosen| chosen.position),
            None => (number < self.map.len()).then_some(number),
        }
    }

    /// Returns the request class of the tensor with this number in read order.
    pub(crate) fn class_of(&self, number: usize) -> Option<usize> {
        match &self.chosen {
            Some(chosen) => chosen.list().get(number).map(|chosen| chosen.class),
            None => (number < self.map.len()).then_some(0),
        }
    }

    /// Returns which slice of the tensor at this position in the map is read, or `None` if the
    /// tensor is not read.
    pub(crate) fn part_at(&self, position: usize) -> Option<TensorSlice> {
        match &self.chosen {
            Some(chosen) => chosen.get(position).map(|chosen| chosen.part.clone()),
            None => self
                .map
                .get_index(position)
                .map(|info| TensorSlice { shape: info.shape.clone(), rows: Rows::single(info.file_range.clone()) }),
        }
    }
}
