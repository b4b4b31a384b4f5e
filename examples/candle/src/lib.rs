//! An image as the weights of a candle model:
//! `VarBuilder::from_backend(Box::new(Weights(image)), …)`.

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;
use dmaload::Image;

/// The tensors of an image, by name.
///
/// candle's CPU tensors own their memory, so each is copied once, from the loaded memory.
pub struct Weights(pub Image);

impl SimpleBackend for Weights {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() == &shape {
            return Ok(tensor);
        }
        Err(Error::UnexpectedShape { msg: format!("shape mismatch for {name}"), expected: shape, got: tensor.shape().clone() }
            .bt())
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor = self.0.tensor(name).map_err(Error::wrap)?;
        let own = match tensor.dtype() {
            dmaload::model::DType::F32 => DType::F32,
            dmaload::model::DType::F16 => DType::F16,
            dmaload::model::DType::BF16 => DType::BF16,
            dmaload::model::DType::F64 => DType::F64,
            dmaload::model::DType::I64 => DType::I64,
            dmaload::model::DType::U32 => DType::U32,
            dmaload::model::DType::U8 => DType::U8,
            other => return Err(Error::Msg(format!("{name}: candle has no {other}")).bt()),
        };
        let bytes = tensor.bytes().map_err(Error::wrap)?;
        Tensor::from_raw_buffer(&bytes, own, tensor.shape(), device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.tensor(name).is_ok()
    }
}
