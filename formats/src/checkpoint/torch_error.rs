//! What can be wrong with a PyTorch file.

const CONVERT: &str =
    "Convert it on a machine you trust: load it with transformers and save_pretrained(.., safe_serialization=True)";

/// Why a PyTorch file cannot be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TorchError {
    /// Not a valid zip archive.
    #[error("not a valid PyTorch zip archive: {reason}. Download it again")]
    Zip {
        /// What is wrong.
        reason: String,
    },
    /// A member is missing.
    #[error("the archive has no member {member:?}. Download it again")]
    NoMember {
        /// Which one.
        member: String,
    },
    /// A member is compressed or encrypted.
    #[error(
        "the archive's member {member:?} is compressed or encrypted; PyTorch stores members plainly. Save it again with torch.save"
    )]
    NotStored {
        /// Which one.
        member: String,
    },
    /// A member reaches beyond the file.
    #[error(
        "the archive's member {member:?} claims bytes {start}..{end}; the file has {file_bytes}. Download it again"
    )]
    Bounds {
        /// Which one.
        member: String,
        /// First byte.
        start: u64,
        /// Byte after the last.
        end: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// Stored on a machine with the other byte order.
    #[error(
        "the tensors are stored {found}-endian; only little-endian is read. Save it again on a little-endian machine"
    )]
    ByteOrder {
        /// What the archive says.
        found: String,
    },
    /// The pickle stream is malformed.
    #[error("malformed pickle at byte {position}: {reason}. Download it again")]
    Pickle {
        /// Byte of the offending instruction.
        position: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// An instruction outside the closed set.
    #[error(
        "the pickle uses instruction 0x{opcode:02x} at byte {position}, which plain weights do not need; it is not executed. {CONVERT}"
    )]
    Opcode {
        /// The instruction.
        opcode: u8,
        /// Its byte.
        position: usize,
    },
    /// A Python object outside the closed set.
    #[error(
        "the pickle names {module}.{name} at byte {position}, which plain weights do not need; nothing is executed. {CONVERT}"
    )]
    Global {
        /// Python module.
        module: String,
        /// Name in it.
        name: String,
        /// Byte of the instruction.
        position: usize,
    },
    /// A bound on memory was hit.
    #[error("the pickle has more than {limit} {what}: it is not a model's. {CONVERT}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// Tensors that are the same bytes again and again.
    #[error("its tensors share their storages: {listed} bytes of them in a file of {stored}. {CONVERT}")]
    Shared {
        /// Bytes of all tensors.
        listed: u64,
        /// Length of the file.
        stored: u64,
    },
    /// The unpickled object is no state dict.
    #[error("the file does not hold a dictionary of tensors but {found}. Save model.state_dict(), not the model")]
    NotAStateDict {
        /// What it holds.
        found: &'static str,
    },
    /// A tensor's description is malformed.
    #[error("the description of tensor {tensor:?} is malformed: {reason}. {CONVERT}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A tensor reaches beyond its storage.
    #[error("tensor {tensor:?} needs {needed} elements of a storage that has {stored}. Download it again")]
    Storage {
        /// The tensor.
        tensor: String,
        /// Elements needed, saturated.
        needed: u64,
        /// Elements there are.
        stored: u64,
    },
    /// One name twice.
    #[error("the tensor {tensor:?} is listed twice. {CONVERT}")]
    Duplicate {
        /// The name.
        tensor: String,
    },
}
