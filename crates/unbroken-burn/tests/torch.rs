//! Weights go from a PyTorch run to Burn and back by name, bit for bit; the net then says what it said in PyTorch.
//!
//! Touches: `fixtures/torch-net`, read only: a run that PyTorch made, its weights, an input and the net's output.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig, PaddingConfig2d};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Tensor, TensorData};
use unbroken::run::read_checkpoint;
use unbroken_burn::torch;

#[derive(Module, Debug)]
struct Net {
    conv: Conv2d,
    norm: BatchNorm,
    hidden: Linear,
    last: Linear,
}

impl Net {
    fn new(device: &Device) -> Net {
        Net {
            conv: Conv2dConfig::new([1, 3], [3, 3])
                .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
                .init(device),
            norm: BatchNormConfig::new(3).init(device),
            hidden: LinearConfig::new(48, 5).with_bias(false).init(device),
            last: LinearConfig::new(5, 2).init(device),
        }
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let seen: Tensor<2> = relu(self.norm.forward(self.conv.forward(images))).flatten(1, 3);
        self.last.forward(relu(self.hidden.forward(seen)))
    }
}

fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../../fixtures/torch-net", name]
        .iter()
        .collect()
}

/// Name, shape and bytes of each tensor of a `.safetensors` file, whoever wrote it.
fn tensors(bytes: &[u8]) -> BTreeMap<String, (Vec<u64>, Vec<u8>)> {
    let (length, rest) = bytes.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(usize::try_from(u64::from_le_bytes(*length)).unwrap());
    let header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header).unwrap();
    let numbers = |value: &serde_json::Value| -> Vec<u64> {
        value
            .as_array()
            .unwrap()
            .iter()
            .map(|number| number.as_u64().unwrap())
            .collect()
    };
    header
        .into_iter()
        .filter(|(name, _)| name != "__metadata__")
        .map(|(name, entry)| {
            assert_eq!(entry["dtype"], "F32");
            let [start, end] = numbers(&entry["data_offsets"])[..] else {
                panic!("a tensor begins and ends")
            };
            (
                name,
                (
                    numbers(&entry["shape"]),
                    data[start as usize..end as usize].to_vec(),
                ),
            )
        })
        .collect()
}

fn floats((_, bytes): &(Vec<u64>, Vec<u8>)) -> Vec<f32> {
    bytes
        .chunks_exact(4)
        .map(|four| f32::from_le_bytes(four.try_into().unwrap()))
        .collect()
}

#[test]
fn weights_go_from_pytorch_to_burn_and_back_bit_for_bit() {
    let device = Device::flex();
    let checkpoint = read_checkpoint(&fixture("run")).unwrap();
    let net = torch::read(Net::new(&device), &checkpoint, "model").unwrap();

    let expected = tensors(&std::fs::read(fixture("weights.safetensors")).unwrap());
    let found = tensors(&torch::safetensors(&net).unwrap());
    assert_eq!(found, expected);

    // Another library adds in another order: close, not equal.
    let example = tensors(&std::fs::read(fixture("example.safetensors")).unwrap());
    let input = TensorData::new(floats(&example["input"]), [6, 1, 4, 4]);
    let output = net.forward(Tensor::from_data(input, &device)).into_data();
    let output: Vec<f32> = output.try_to_vec::<f32>().unwrap();
    for (found, expected) in output.iter().zip(floats(&example["output"])) {
        assert!((found - expected).abs() < 1e-5, "{output:?}");
    }
}

#[test]
fn a_net_of_another_shape_is_refused_by_name() {
    #[derive(Module, Debug)]
    struct Other {
        conv: Conv2d,
    }
    let device = Device::flex();
    let checkpoint = read_checkpoint(&fixture("run")).unwrap();
    let other = Other {
        conv: Conv2dConfig::new([1, 3], [3, 3]).init(&device),
    };
    let error = torch::read(other, &checkpoint, "model").unwrap_err().to_string();
    assert!(
        error.contains("hidden.weight") || error.contains("last.") || error.contains("norm."),
        "{error}"
    );
    let error = torch::read(Net::new(&device), &checkpoint, "teacher").unwrap_err();
    assert!(error.to_string().contains("`teacher`"), "{error}");
}
