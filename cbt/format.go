// The bytes of a map in memory. All links are node numbers, never addresses,
// so that memory can be a file mapping that outlives the process.
//
// Words are 8 bytes, aligned, in the machine's byte order: they are changed
// by atomic operations, and memory never leaves its machine. Byte i of a
// leaf's map is bits 8*(i%8) to 8*(i%8)+7 of its word i/8.
//
// Memory is an array of nodes of 4,160 bytes. Node 0 is the header:
//
//	offset  size  field
//	     0     8  magic "blkscbt\n"
//	     8     4  version, 1
//	    12     4  tracking block size as a power of two, 12 to 24
//	    16     4  CRC-32C of bytes 0 to 15
//	    20     4  zero
//	    64     8  live map's record: its offset / 64 in bits 0 to 32, bits 0
//	              to 30 of its checksum in 33 to 63. Storing this word commits
//	              a Freeze or a Reset
//	    72     8  link to the first table
//
// All other nodes, where a root leads to them; the content of the rest is
// undefined:
//
//	offset  size  field
//	     0     8  level: 0 leaf, 1 to 5 index, 7 table
//	     8     8  epoch
//	    16     8  base that a leaf's bytes count from
//	    24     8  number: no byte below this node stands for a higher one
//	    32     8  first tracking block below this node; of a table, zero
//	    40     8  CRC-32C of bytes 0 to 39
//	    48     8  of a table, link to the next one; else zero
//	    56     8  zero
//	    64  4096  leaf: one byte for each of 4,096 tracking blocks
//	              index: 512 links; 0 where nothing was ever marked
//	              table: 64 records
//
// A link is a word: node number in bits 0 to 25, level in 26 to 28, epoch in
// 29 to 63. A record, 64 bytes:
//
//	offset  size  field
//	     0     8  state: 0 free, 1 in use, 2 in use and lost
//	     8     8  link to the root; 0 where nothing was ever marked
//	    16     8  size of the device in bytes
//	    24     8  number: of a frozen map its own, of the live map the one
//	              that marks get
//	    32     8  base
//	    40    16  generation
//	    56     8  CRC-32C of bytes 24 to 55
//
// The record that the header names is the live map. The others in use are the
// frozen maps, but for two: one with the live map's number or a higher one,
// which a Freeze or a Reset was killed over before its commit; and one of
// another generation with the live map's base for a number, the live map before
// a Reset that was killed after its commit.

package cbt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"

	"github.com/google/uuid"
)

const (
	magic   = "blkscbt\n"
	version = 1

	nodeHeader = 64
	nodeData   = 4096
	nodeSize   = nodeHeader + nodeData

	leafBits   = 12 // a leaf's tracking blocks, as a power of two
	indexBits  = 9  // an index's links, as a power of two
	maxLevel   = 5  // enough for 2^51 tracking blocks: 8 EiB of 4 KiB
	tableLevel = 7

	recordSize = 64

	minShift = 12
	maxShift = 24
)

// Offsets in the header.
const (
	headerVersion = 8
	headerShift   = 12
	headerSum     = 16
	headerLive    = 64
	headerTable   = 72
)

// Offsets in a node's header.
const (
	nodeLevel  = 0
	nodeEpoch  = 8
	nodeBase   = 16
	nodeNumber = 24
	nodeFirst  = 32
	nodeSum    = 40
	nodeNext   = 48
)

// Offsets in a record, and its states.
const (
	recordState      = 0
	recordRoot       = 8
	recordBytes      = 16
	recordNumber     = 24
	recordBase       = 32
	recordGeneration = 40
	recordSum        = 56

	stateFree = 0
	stateUsed = 1
	stateLost = 2
)

// What Open says about memory that it cannot use. The user does three
// different things about them.
var (
	ErrNoMap   = errors.New("no changed-block map")
	ErrVersion = errors.New("changed-block map of an unknown version")
	ErrDamaged = errors.New("changed-block map is damaged")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// node is the number of a node. Node 0 is the header.
type node uint32

// offset is where the node begins in memory.
func (no node) offset() int64 { return int64(no) * nodeSize }

// A link's parts.
const (
	nodeBits  = 26
	levelBits = 3

	// maxNodes is how many nodes a link can tell apart: 260 GiB of memory.
	maxNodes = 1 << nodeBits

	// maxEpoch is half of what a link can tell apart, so that Open, too, finds
	// new epochs. A hundred snapshots and views a second use them up in two
	// years.
	maxEpoch = 1 << (63 - nodeBits - levelBits)
)

// link names a node, with its level and its epoch, so that a marker need not
// look into nodes on its way. 0 stands for a node with nothing in it.
type link uint64

func newLink(no node, level int, epoch uint64) link {
	return link(epoch<<(nodeBits+levelBits) | uint64(level)<<nodeBits | uint64(no))
}

func (l link) node() node    { return node(l & (maxNodes - 1)) }
func (l link) level() int    { return int(l >> nodeBits & (1<<levelBits - 1)) }
func (l link) epoch() uint64 { return uint64(l >> (nodeBits + levelBits)) }

// data is where the node's map bytes or links begin in memory.
func (l link) data() int64 { return l.node().offset() + nodeHeader }

// slot is where the link to the node that holds block is in memory. l is an
// index on the path to it.
func (l link) slot(block int64) int64 {
	i := block >> spanBits(l.level()-1) & (1<<indexBits - 1)
	return l.data() + i*8
}

// spanBits is how many tracking blocks a node of the level covers, as a power
// of two.
func spanBits(level int) int { return leafBits + level*indexBits }

// levelFor is the lowest level of a root that covers block.
func levelFor(block int64) int {
	return max(0, (bits.Len64(uint64(block))-leafBits+indexBits-1)/indexBits)
}

// encodeHeader fills the fixed part of the header p but for the magic, which
// it returns as a word: a header without it is none.
func encodeHeader(p []byte, shift int) (word uint64) {
	var h [headerSum]byte
	copy(h[:], magic)
	binary.NativeEndian.PutUint32(h[headerVersion:], version)
	binary.NativeEndian.PutUint32(h[headerShift:], uint32(shift))
	binary.NativeEndian.PutUint32(p[headerSum:], crc32.Checksum(h[:], castagnoli))
	copy(p[headerVersion:], h[headerVersion:])
	return binary.NativeEndian.Uint64(h[:])
}

// decodeHeader returns the tracking block size as a power of two.
func decodeHeader(p []byte) (shift int, err error) {
	if string(p[:len(magic)]) != magic {
		return 0, ErrNoMap
	}
	if v := binary.NativeEndian.Uint32(p[headerVersion:]); v != version {
		return 0, fmt.Errorf("%w: %d", ErrVersion, v)
	}
	if binary.NativeEndian.Uint32(p[headerSum:]) != crc32.Checksum(p[:headerSum], castagnoli) {
		return 0, fmt.Errorf("%w: checksum of its header", ErrDamaged)
	}
	shift = int(binary.NativeEndian.Uint32(p[headerShift:]))
	if shift < minShift || shift > maxShift {
		return 0, fmt.Errorf("%w: tracking blocks of 2^%d bytes", ErrDamaged, shift)
	}
	return shift, nil
}

// nodeInfo is the header of a node. It never changes after the node was
// published.
type nodeInfo struct {
	level  int
	epoch  uint64
	base   uint64
	number uint64
	first  int64
}

// encode fills the node header p.
func (i nodeInfo) encode(p []byte) {
	clear(p[:nodeHeader])
	binary.NativeEndian.PutUint64(p[nodeLevel:], uint64(i.level))
	binary.NativeEndian.PutUint64(p[nodeEpoch:], i.epoch)
	binary.NativeEndian.PutUint64(p[nodeBase:], i.base)
	binary.NativeEndian.PutUint64(p[nodeNumber:], i.number)
	binary.NativeEndian.PutUint64(p[nodeFirst:], uint64(i.first))
	binary.NativeEndian.PutUint64(p[nodeSum:], uint64(crc32.Checksum(p[:nodeSum], castagnoli)))
}

// decodeNode returns what the node header p says, or false if its checksum is
// wrong.
func decodeNode(p []byte) (nodeInfo, bool) {
	if binary.NativeEndian.Uint64(p[nodeSum:]) != uint64(crc32.Checksum(p[:nodeSum], castagnoli)) {
		return nodeInfo{}, false
	}
	return nodeInfo{
		level:  int(binary.NativeEndian.Uint64(p[nodeLevel:])),
		epoch:  binary.NativeEndian.Uint64(p[nodeEpoch:]),
		base:   binary.NativeEndian.Uint64(p[nodeBase:]),
		number: binary.NativeEndian.Uint64(p[nodeNumber:]),
		first:  int64(binary.NativeEndian.Uint64(p[nodeFirst:])),
	}, true
}

// history is what a record says about its map, and what never changes in it.
type history struct {
	number     uint64
	base       uint64
	generation uuid.UUID
}

// encode fills the fixed part of the record p. It leaves state, root and size
// alone.
func (h history) encode(p []byte) {
	binary.NativeEndian.PutUint64(p[recordNumber:], h.number)
	binary.NativeEndian.PutUint64(p[recordBase:], h.base)
	copy(p[recordGeneration:], h.generation[:])
	sum := crc32.Checksum(p[recordNumber:recordSum], castagnoli)
	binary.NativeEndian.PutUint64(p[recordSum:], uint64(sum))
}

// commitWord is what the header says when the record at off, with the bytes p,
// is the live map's.
func commitWord(off int64, p []byte) uint64 {
	return binary.NativeEndian.Uint64(p[recordSum:])<<33 | uint64(off/recordSize)
}

// commitOffset is the offset of the record that a commit word names.
func commitOffset(word uint64) int64 { return int64(word&(1<<33-1)) * recordSize }

// decodeHistory returns the fixed part of the record p, or false if its
// checksum or its numbers are wrong.
func decodeHistory(p []byte) (history, bool) {
	sum := crc32.Checksum(p[recordNumber:recordSum], castagnoli)
	h := history{
		number:     binary.NativeEndian.Uint64(p[recordNumber:]),
		base:       binary.NativeEndian.Uint64(p[recordBase:]),
		generation: uuid.UUID(p[recordGeneration:recordSum]),
	}
	ok := binary.NativeEndian.Uint64(p[recordSum:]) == uint64(sum) &&
		h.number > h.base && h.number-h.base <= maxByte
	return h, ok
}
