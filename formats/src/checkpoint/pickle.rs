//! Just enough of Python's pickle to see what a `torch.save` file lists. Nothing is executed.
//!
//! A closed set of instructions builds an inert tree in one arena: nodes refer to each other by number, so sharing costs
//! nothing, loops are harmless, and neither building nor dropping recurses. Each instruction makes at most one node, so the
//! tree is bounded by the length of the stream. Names of Python objects outside a closed set are errors at once.
//! It knows nothing of zip archives or of what tensors are for.

use std::collections::HashMap;

use super::torch_error::TorchError as Error;
use crate::model::DType;

/// Most nodes of a tree; a model of a thousand tensors has some 20 000.
const NODES_MAX: usize = 4_000_000;
/// Most dimensions of a tensor, as PyTorch has it, and longest name of a storage. What a pickle says once may be referred to by every
/// tensor, and each of them is written out.
const DIMENSIONS_MAX: usize = 64;
const STORAGE_NAME_BYTES_MAX: usize = 255;

/// A tensor as the pickle describes it; nothing has been compared with the storages yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ListedTensor {
    pub(crate) name: String,
    /// Name of the storage: the archive's member `data/<key>`.
    pub(crate) storage: String,
    pub(crate) element: Element,
    /// Elements of the storage.
    pub(crate) storage_elements: u64,
    /// First element in the storage.
    pub(crate) offset: u64,
    pub(crate) shape: Vec<usize>,
    pub(crate) strides: Vec<usize>,
}

/// Element type of a storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Element {
    /// Set for the types that weights have.
    pub(crate) weight: Option<DType>,
    pub(crate) name: &'static str,
    pub(crate) bytes: u64,
}

#[derive(Clone, Copy)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Size,
    Storage(Element),
}

impl Global {
    /// The closed set.
    fn find(module: &str, name: &str) -> Option<Self> {
        let element = |name, bytes, weight| Some(Self::Storage(Element { weight, name, bytes }));
        match (module, name) {
            ("collections", "OrderedDict") => Some(Self::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Some(Self::RebuildParameter),
            ("torch", "Size") => Some(Self::Size),
            ("torch", "FloatStorage") => element("f32", 4, Some(DType::F32)),
            ("torch", "HalfStorage") => element("f16", 2, Some(DType::F16)),
            ("torch", "BFloat16Storage") => element("bf16", 2, Some(DType::Bf16)),
            ("torch", "DoubleStorage") => element("f64", 8, None),
            ("torch", "LongStorage") => element("i64", 8, None),
            ("torch", "IntStorage") => element("i32", 4, None),
            ("torch", "ShortStorage") => element("i16", 2, None),
            ("torch", "CharStorage") => element("i8", 1, None),
            ("torch", "ByteStorage") => element("u8", 1, None),
            ("torch", "BoolStorage") => element("bool", 1, None),
            _ => None,
        }
    }
}

/// The instruction that ends a stream.
const STOP: u8 = b'.';

type Id = u32;

enum Node<'a> {
    None,
    Bool,
    Int(i64),
    Float,
    Text(&'a str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    /// A call that is described and not made.
    Call(Global, Id),
    /// A reference to something outside the stream: a storage.
    Persistent(Id),
}

/// The tensors that a `data.pkl` lists.
pub(crate) fn list_tensors(stream: &[u8]) -> Result<Vec<ListedTensor>, Error> {
    let mut machine =
        Machine { stream, at: 0, nodes: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    let root = machine.run()?;
    machine.state_dict(root)
}

struct Machine<'a> {
    stream: &'a [u8],
    at: usize,
    nodes: Vec<Node<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack at each MARK.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    /// Run to STOP; the one object left.
    fn run(&mut self) -> Result<Id, Error> {
        loop {
            let position = self.at;
            let opcode = self.byte()?;
            if opcode == STOP {
                return self.root();
            }
            let known = self.scalar(opcode)?
                || self.container(opcode)?
                || self.memory(opcode)?
                || self.object(opcode, position)?
                || self.framing(opcode)?;
            if !known {
                return Err(Error::Opcode { opcode, position });
            }
        }
    }

    /// At STOP nothing but the result is left.
    fn root(&mut self) -> Result<Id, Error> {
        let root = self.pop()?;
        if self.stack.is_empty() && self.marks.is_empty() { Ok(root) } else { Err(self.malformed("objects left over")) }
    }

    /// Follows an instruction that says something of the stream. Whether it is one; likewise below.
    fn framing(&mut self, opcode: u8) -> Result<bool, Error> {
        match opcode {
            // PROTO, FRAME
            0x80 => _ = self.byte()?,
            0x95 => _ = self.take(8)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// An instruction that makes a single value.
    fn scalar(&mut self, opcode: u8) -> Result<bool, Error> {
        match opcode {
            b'N' => self.push(Node::None)?,
            0x88 | 0x89 => self.push(Node::Bool)?,
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.push(Node::Int(value.into()))?;
            }
            b'K' => {
                let value = self.byte()?;
                self.push(Node::Int(value.into()))?;
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.push(Node::Int(value.into()))?;
            }
            0x8a => self.long()?,
            b'G' => {
                self.take(8)?;
                self.push(Node::Float)?;
            }
            // BINUNICODE and BINSTRING; SHORT_BINUNICODE and SHORT_BINSTRING
            b'X' | b'T' => {
                let length = u32::from_le_bytes(self.array()?);
                self.text(length as usize)?;
            }
            0x8c | b'U' => {
                let length = self.byte()?;
                self.text(length.into())?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// An instruction that makes or fills a tuple, list or dictionary, and MARK, which says from where on.
    fn container(&mut self, opcode: u8) -> Result<bool, Error> {
        match opcode {
            b'(' => self.marks.push(self.stack.len()),
            b')' => self.push(Node::Tuple(Vec::new()))?,
            b']' => self.push(Node::List(Vec::new()))?,
            b'}' => self.push(Node::Dict(Vec::new()))?,
            0x85..=0x87 => {
                let items = self.pop_last((opcode - 0x84).into())?;
                self.push(Node::Tuple(items))?;
            }
            b't' => {
                let items = self.pop_marked()?;
                self.push(Node::Tuple(items))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.list()?.push(item);
            }
            b'e' => {
                let items = self.pop_marked()?;
                self.list()?.extend(items);
            }
            b's' => {
                let pair = self.pop_last(2)?;
                self.dict()?.push((pair[0], pair[1]));
            }
            b'u' => {
                let items = self.pop_marked()?;
                if items.len() % 2 != 0 {
                    return Err(self.malformed("a key without a value"));
                }
                self.dict()?.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// An instruction that remembers an object or recalls one.
    fn memory(&mut self, opcode: u8) -> Result<bool, Error> {
        match opcode {
            b'q' => {
                let key = self.byte()?;
                self.remember(key.into())?;
            }
            b'r' => {
                let key = u32::from_le_bytes(self.array()?);
                self.remember(key)?;
            }
            0x94 => self.remember(self.memo.len() as u32)?,
            b'h' => {
                let key = self.byte()?;
                self.recall(key.into())?;
            }
            b'j' => {
                let key = u32::from_le_bytes(self.array()?);
                self.recall(key)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// An instruction about a name of Python's, or a call: described, never made.
    fn object(&mut self, opcode: u8, position: usize) -> Result<bool, Error> {
        match opcode {
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name, position)?;
            }
            0x93 => {
                let pair = self.pop_last(2)?;
                let (Some(module), Some(name)) = (self.string(pair[0]), self.string(pair[1])) else {
                    return Err(self.malformed("a name that is no text"));
                };
                self.global(module, name, position)?;
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Node::Persistent(id))?;
            }
            b'R' => self.call()?,
            // BUILD: the attributes of an OrderedDict (`_metadata`) are of no use here.
            b'b' => {
                self.pop()?;
                self.dict()?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn malformed(&self, reason: &'static str) -> Error {
        Error::Pickle { position: self.at, reason }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Error> {
        let bytes = self.stream.get(self.at..).and_then(|rest| rest.get(..length));
        let bytes = bytes.ok_or_else(|| self.malformed("the stream ends early"))?;
        self.at += length;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn byte(&mut self) -> Result<u8, Error> {
        Ok(self.array::<1>()?[0])
    }

    fn line(&mut self) -> Result<&'a str, Error> {
        let rest = &self.stream[self.at..];
        let length = rest.iter().position(|&byte| byte == b'\n');
        let length = length.ok_or_else(|| self.malformed("the stream ends early"))?;
        let line = std::str::from_utf8(&rest[..length]).map_err(|_| self.malformed("text that is not UTF-8"))?;
        self.at += length + 1;
        Ok(line)
    }

    fn push(&mut self, node: Node<'a>) -> Result<(), Error> {
        if self.nodes.len() == NODES_MAX {
            return Err(Error::Limit { what: "objects", limit: NODES_MAX });
        }
        self.stack.push(self.nodes.len() as Id);
        self.nodes.push(node);
        Ok(())
    }

    /// Objects below the last MARK belong to whoever reads up to it.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Id, Error> {
        if self.stack.len() <= self.floor() {
            return Err(self.malformed("an object is missing"));
        }
        self.stack.pop().ok_or_else(|| self.malformed("an object is missing"))
    }

    fn pop_last(&mut self, count: usize) -> Result<Vec<Id>, Error> {
        match self.stack.len().checked_sub(count) {
            Some(from) if from >= self.floor() => Ok(self.stack.split_off(from)),
            _ => Err(self.malformed("an object is missing")),
        }
    }

    fn pop_marked(&mut self) -> Result<Vec<Id>, Error> {
        let from = self.marks.pop().ok_or_else(|| self.malformed("a mark is missing"))?;
        Ok(self.stack.split_off(from))
    }

    fn top(&self) -> Result<Id, Error> {
        self.stack.last().copied().ok_or_else(|| self.malformed("an object is missing"))
    }

    fn list(&mut self) -> Result<&mut Vec<Id>, Error> {
        let (top, error) = (self.top()?, self.malformed("an item for something that is no list"));
        if let Node::List(items) = &mut self.nodes[top as usize] { Ok(items) } else { Err(error) }
    }

    fn dict(&mut self) -> Result<&mut Vec<(Id, Id)>, Error> {
        let (top, error) = (self.top()?, self.malformed("an item or state for something that is no dictionary"));
        if let Node::Dict(items) = &mut self.nodes[top as usize] { Ok(items) } else { Err(error) }
    }

    /// LONG1: a little-endian integer in as few bytes as it takes.
    fn long(&mut self) -> Result<(), Error> {
        let length = self.byte()?.into();
        let bytes = self.take(length)?;
        if bytes.len() > 8 {
            return Err(self.malformed("an integer beyond 64 bits"));
        }
        let fill = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 };
        let mut wide = [fill; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        self.push(Node::Int(i64::from_le_bytes(wide)))
    }

    fn text(&mut self, length: usize) -> Result<(), Error> {
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| self.malformed("text that is not UTF-8"))?;
        self.push(Node::Text(text))
    }

    fn remember(&mut self, key: u32) -> Result<(), Error> {
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<(), Error> {
        let id = self.memo.get(&key).copied().ok_or_else(|| self.malformed("a memo that was never made"))?;
        self.stack.push(id);
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str, position: usize) -> Result<(), Error> {
        let global = Global::find(module, name).ok_or_else(|| {
            let short = |text: &str| text.chars().take(80).collect();
            Error::Global { module: short(module), name: short(name), position }
        })?;
        self.push(Node::Global(global))
    }

    fn call(&mut self) -> Result<(), Error> {
        let pair = self.pop_last(2)?;
        let (Node::Global(callee), Node::Tuple(arguments)) =
            (&self.nodes[pair[0] as usize], &self.nodes[pair[1] as usize])
        else {
            return Err(self.malformed("a call of something that cannot be called"));
        };
        match (callee, arguments.as_slice()) {
            (Global::OrderedDict, []) => self.push(Node::Dict(Vec::new())),
            (Global::Size, &[sizes]) => {
                self.stack.push(sizes);
                Ok(())
            }
            (Global::RebuildTensor | Global::RebuildParameter, _) => self.push(Node::Call(*callee, pair[1])),
            _ => Err(self.malformed("a call of something that cannot be called")),
        }
    }

    fn string(&self, id: Id) -> Option<&'a str> {
        match &self.nodes[id as usize] {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    fn tuple(&self, id: Id) -> Option<&[Id]> {
        match &self.nodes[id as usize] {
            Node::Tuple(items) => Some(items),
            _ => None,
        }
    }

    fn number(&self, id: Id) -> Option<u64> {
        match &self.nodes[id as usize] {
            Node::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        let items = self.tuple(id).filter(|items| items.len() <= DIMENSIONS_MAX)?;
        items.iter().map(|&item| self.number(item)?.try_into().ok()).collect()
    }

    fn state_dict(&self, root: Id) -> Result<Vec<ListedTensor>, Error> {
        let items = match &self.nodes[root as usize] {
            Node::Dict(items) => items,
            other => return Err(Error::NotAStateDict { found: other.kind() }),
        };
        let (mut tensors, mut seen) = (Vec::new(), std::collections::HashSet::new());
        for &(key, value) in items {
            let Some(name) = self.string(key) else {
                return Err(Error::NotAStateDict { found: "a dictionary whose keys are not names" });
            };
            // Anything else that is listed is no weight, and no business of ours.
            if !matches!(self.nodes[value as usize], Node::Call(..)) {
                continue;
            }
            if !seen.insert(name) {
                return Err(Error::Duplicate { tensor: name.into() });
            }
            tensors.push(self.tensor(name, value).map_err(|reason| Error::Tensor { tensor: name.into(), reason })?);
        }
        if tensors.is_empty() {
            return Err(Error::NotAStateDict { found: "a dictionary without tensors" });
        }
        Ok(tensors)
    }

    fn tensor(&self, name: &str, id: Id) -> Result<ListedTensor, &'static str> {
        let call = |id: Id| match &self.nodes[id as usize] {
            Node::Call(callee, arguments) => Some((*callee, self.tuple(*arguments)?)),
            _ => None,
        };
        let (mut callee, mut arguments) = call(id).ok_or("it is no tensor")?;
        // A parameter wraps a tensor, once.
        if let (Global::RebuildParameter, [data, _requires_grad, _hooks]) = (callee, arguments) {
            (callee, arguments) = call(*data).ok_or("the parameter holds no tensor")?;
        }
        // After the strides: requires_grad, hooks and, in newer files, metadata.
        let (
            Global::RebuildTensor,
            &[storage, offset, shape, strides, _, _] | &[storage, offset, shape, strides, _, _, _],
        ) = (callee, arguments)
        else {
            return Err("it is not rebuilt from a storage");
        };
        let storage = match &self.nodes[storage as usize] {
            Node::Persistent(id) => self.tuple(*id),
            _ => None,
        };
        let Some(&[kind, class, key, _device, elements]) = storage else {
            return Err("its storage is malformed");
        };
        let (Some("storage"), Node::Global(Global::Storage(element))) =
            (self.string(kind), &self.nodes[class as usize])
        else {
            return Err("its storage is of an unknown type");
        };
        let shape = self.sizes(shape).ok_or("its shape is malformed")?;
        let strides = self.sizes(strides).ok_or("its strides are malformed")?;
        if shape.len() != strides.len() {
            return Err("it has not as many strides as dimensions");
        }
        Ok(ListedTensor {
            name: name.into(),
            storage: self
                .string(key)
                .filter(|name| name.len() <= STORAGE_NAME_BYTES_MAX)
                .ok_or("its storage has no name, or a very long one")?
                .into(),
            element: *element,
            storage_elements: self.number(elements).ok_or("its storage has no size")?,
            offset: self.number(offset).ok_or("its offset is malformed")?,
            shape,
            strides,
        })
    }
}

impl Node<'_> {
    const fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool => "a truth value",
            Self::Int(_) | Self::Float => "a number",
            Self::Text(_) => "a text",
            Self::Tuple(_) => "a tuple",
            Self::List(_) => "a list",
            Self::Dict(_) => "a dictionary",
            Self::Global(_) => "a class",
            Self::Call(..) => "one tensor",
            Self::Persistent(_) => "a storage",
        }
    }
}
