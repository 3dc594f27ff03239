//! Weights go from a PyTorch run to Burn and back by name, bit for bit; the net then says what it said in PyTorch.
//!
//! Touches: `fixtures/torch-net` and `fixtures/torch-sequences`, read only: runs that PyTorch made, their weights, an
//! input and the net's output.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::module::Module;
use burn::nn::attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::gru::{BiGru, BiGruConfig, Gru, GruConfig};
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig, PaddingConfig2d};
use burn::nn::{
    BiLstm, BiLstmConfig, BiRnn, BiRnnConfig, LinearLayout, Lstm, LstmConfig, PRelu, PReluConfig, Rnn,
    RnnConfig,
};
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

/// One of each layer that PyTorch keeps in other pieces.
#[derive(Module, Debug)]
struct Sequences {
    lstm: Lstm,
    back: BiLstm,
    gru: BiGru,
    one: Gru,
    rnn: Rnn,
    both: BiRnn,
    attention: MultiHeadAttention,
    bend: PRelu,
    last: Linear,
}

impl Sequences {
    fn new(device: &Device) -> Sequences {
        Sequences {
            lstm: LstmConfig::new(3, 4, true).init(device),
            back: BiLstmConfig::new(4, 2, true).init(device),
            gru: BiGruConfig::new(4, 2, true).init(device),
            one: GruConfig::new(4, 4, false).init(device),
            rnn: RnnConfig::new(4, 4, true).init(device),
            both: BiRnnConfig::new(4, 2, true).init(device),
            attention: MultiHeadAttentionConfig::new(4, 2).with_dropout(0.0).init(device),
            bend: PReluConfig::new().init(device),
            last: LinearConfig::new(4, 2)
                .with_layout(LinearLayout::Col)
                .init(device),
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let x = self.lstm.forward(x, None).0;
        let x = self.back.forward(x, None).0;
        let x = self.gru.forward(x, None).0;
        let x = self.one.forward(x, None);
        let x = self.rnn.forward(x, None).0;
        let x = self.both.forward(x, None).0;
        let x = self.attention.forward(MhaInput::self_attn(x)).context;
        self.last.forward(self.bend.forward(x))
    }
}

fn fixture(of: &str, name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../../fixtures", of, name]
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

/// Reads a PyTorch run's weights, writes them again, and compares what the net makes of the fixture's input.
fn assert_translated<const I: usize, const O: usize, M: Module>(
    of: &str,
    net: impl Fn(&Device) -> M,
    forward: impl Fn(&M, Tensor<I>) -> Tensor<O>,
) {
    let device = Device::flex();
    let checkpoint = read_checkpoint(&fixture(of, "run")).unwrap();
    let net = torch::read(net(&device), &checkpoint, "model").unwrap();

    let expected = tensors(&std::fs::read(fixture(of, "weights.safetensors")).unwrap());
    let found = tensors(&torch::safetensors(&net).unwrap());
    assert_eq!(found, expected);

    // Another library adds in another order: close, not equal.
    let example = tensors(&std::fs::read(fixture(of, "example.safetensors")).unwrap());
    let shape: Vec<usize> = example["input"].0.iter().map(|size| *size as usize).collect();
    let input = TensorData::new(floats(&example["input"]), shape);
    let output = forward(&net, Tensor::from_data(input, &device)).into_data();
    let (output, expected) = (output.try_to_vec::<f32>().unwrap(), floats(&example["output"]));
    assert_eq!(output.len(), expected.len());
    for (found, expected) in output.iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-5, "{output:?} is not {expected:?}");
    }
}

#[test]
fn weights_go_from_pytorch_to_burn_and_back_bit_for_bit() {
    assert_translated("torch-net", Net::new, Net::forward);
}

#[test]
fn gates_and_projections_that_pytorch_keeps_in_one_tensor_go_there_and_back() {
    assert_translated("torch-sequences", Sequences::new, Sequences::forward);
}

/// A layer with fewer gates than PyTorch's has no form there, in either direction.
#[test]
fn a_layer_that_pytorch_does_not_have_is_refused_by_name() {
    #[derive(Module, Debug)]
    struct Keyless {
        attention: MultiHeadAttention,
    }
    let device = Device::flex();
    let keyless = Keyless {
        attention: MultiHeadAttentionConfig::new(4, 2)
            .with_key_bias(false)
            .init(&device),
    };
    let error = torch::safetensors(&keyless).unwrap_err().to_string();
    assert!(
        error.contains("`attention.in_proj_bias`") && error.contains("has 2"),
        "{error}"
    );
    let checkpoint = read_checkpoint(&fixture("torch-sequences", "run")).unwrap();
    let error = torch::read(keyless, &checkpoint, "model")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`attention.in_proj_bias` of the checkpoint is not in the module, or not all"),
        "{error}"
    );
}

#[test]
fn a_net_of_another_shape_is_refused_by_name() {
    #[derive(Module, Debug)]
    struct Other {
        conv: Conv2d,
    }
    let device = Device::flex();
    let checkpoint = read_checkpoint(&fixture("torch-net", "run")).unwrap();
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
