//! A model of a few hundred bytes, as the checkpoints that fuzzing begins with: small, so that most mutations hit structure.

use flashlm_formats::checkpoint::{PublishedTensor, published_tensors};

use super::mend;

/// Its `config.json`.
pub const CONFIG: &[u8] =
    br#"{"model_type":"opt","hidden_size":4,"num_attention_heads":2,"num_hidden_layers":1,"ffn_dim":6,
"vocab_size":8,"max_position_embeddings":4,"word_embed_proj_dim":4,"tie_word_embeddings":true}"#;

/// Header of a predictor as others keep it, of four inputs and nine neurons.
pub const FOREIGN: &[u8] = br#"{"fc1.weight":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]},
"fc2.weight":{"dtype":"F16","shape":[9,2],"data_offsets":[32,68]},"fc2.bias":{"dtype":"BF16","shape":[9],"data_offsets":[68,86]}}"#;

/// The file of that.
pub fn foreign() -> Vec<u8> {
    mend::safetensors_file(FOREIGN)
}

/// Bytes of each of its storages: more than any of its tensors has.
const STORAGE_BYTES: usize = 256;

pub fn tensors() -> Vec<PublishedTensor> {
    published_tensors(CONFIG).expect("a good configuration").1
}

/// The JSON of a safetensors file of half-precision tensors, and the length of their data.
pub fn safetensors_json(tensors: &[PublishedTensor]) -> (String, usize) {
    let mut end = 0;
    let entries: Vec<String> = tensors
        .iter()
        .map(|tensor| {
            let (begin, shape) = (end, tensor.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(","));
            end += 2 * tensor.shape.iter().product::<usize>();
            format!(r#""{}":{{"dtype":"F16","shape":[{shape}],"data_offsets":[{begin},{end}]}}"#, tensor.name)
        })
        .collect();
    (format!("{{{}}}", entries.join(",")), end)
}

/// A safetensors file of zeros with these tensors.
pub fn safetensors(tensors: &[PublishedTensor]) -> Vec<u8> {
    let (json, bytes) = safetensors_json(tensors);
    let mut file = mend::safetensors_head(json.as_bytes(), 8);
    file.resize(file.len() + bytes, 0);
    file
}

fn text(text: &str) -> Vec<u8> {
    [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

fn numbers(values: &[usize]) -> Vec<u8> {
    let items = values.iter().flat_map(|&value| [b'M', value as u8, (value >> 8) as u8]);
    [b"(".to_vec(), items.collect(), b"t".to_vec()].concat()
}

/// A state dict as `torch.save` pickles it, each tensor in a storage of its own; every third one is transposed, so that strides occur.
pub fn pickle(tensors: &[PublishedTensor]) -> Vec<u8> {
    let mut out = b"\x80\x02ccollections\nOrderedDict\n)Rq\x00(".to_vec();
    for (number, PublishedTensor { name, shape }) in tensors.iter().enumerate() {
        let elements: usize = shape.iter().product();
        let strides = match *shape.as_slice() {
            [rows, _] if number.is_multiple_of(3) => vec![1, rows],
            [_, columns] => vec![columns, 1],
            _ => vec![1],
        };
        out.extend(text(name));
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        out.extend(text("storage"));
        out.extend(b"ctorch\nHalfStorage\n");
        out.extend(text(&(number % STORAGES).to_string()));
        out.extend(text("cpu"));
        out.extend([b'M', elements as u8, (elements >> 8) as u8]);
        out.extend(b"tQK\x00");
        out.extend(numbers(shape));
        out.extend(numbers(&strides));
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u}X\x09\x00\x00\x00_metadata}sb.");
    out
}

/// Storages of an archive; a tensor's number is cut to it.
const STORAGES: usize = 4;

/// A `pytorch_model.bin` around a pickle: a zip archive of plain members.
pub fn archive(pickle: &[u8]) -> Vec<u8> {
    let storages: Vec<String> = (0..STORAGES).map(|number| format!("m/data/{number}")).collect();
    let mut members = vec![("m/data.pkl", pickle), ("m/byteorder", b"little")];
    members.extend(storages.iter().map(|name| (name.as_str(), &[0; STORAGE_BYTES][..])));
    zip(&members)
}

fn zip(members: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in members {
        let (offset, length, name_length) = (out.len() as u32, content.len() as u32, name.len() as u16);
        // Version, flags, method, time, date, checksum (nobody holds it against anything), both lengths, length of the name and of nothing more.
        let mut common = [20_u16, 0, 0, 0, 0, 0, 0].iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
        common.extend([length, length].iter().flat_map(|n| n.to_le_bytes()));
        common.extend(name_length.to_le_bytes());
        common.extend([0, 0]);
        out.extend([b"PK\x03\x04", &common[..], name.as_bytes(), content].concat());
        let place = [&[0; 10][..], &offset.to_le_bytes()].concat();
        directory.extend([b"PK\x01\x02\x14\x00", &common[..], &place, name.as_bytes()].concat());
    }
    let (count, at, length) = (members.len() as u16, out.len() as u32, directory.len() as u32);
    out.extend(&directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend([count, count].iter().flat_map(|n| n.to_le_bytes()));
    out.extend([length, at].iter().flat_map(|n| n.to_le_bytes()));
    out.extend([0, 0]);
    out
}
