// The formats of what a killed process leaves behind in its run directory: the
// catalogue, and the header of a layer's file or an overlay's. (The table that
// follows the header is in table.go, the change map in package cbt.)
//
// All of it lives until the next boot and is written through mappings, so numbers
// are in the machine's byte order. What is written once is covered by a checksum;
// words that change while others look at them are stored atomically and are valid
// with every value.
//
// Catalogue: a header, then records of 512 bytes
//
//	offset  size  field
//	     0     8  "blksnapC", stored last
//	     8     4  version, 1
//	    12     4  CRC-32C of bytes 8 to 11 and 16 to 51
//	    16    36  boot id, as text
//	    56     8  last snapshot id given out; changes
//	    64  4032  words, each the FNV-1a hash (64 bits, and never 0) of the name of a device
//	              whose files here nobody may believe (distrust.go), or of the empty name
//	              (allBlock); 0: none; change
//	  4096     …  records
//
// Record of a snapshot
//
//	offset  size  field
//	     0     8  state: 0 free, 1 prepared, 2 live, 3 dying; changes
//	     8     8  the instant, in nanoseconds since 1970; written before state 2
//	    16     8  how long writes were held up, in nanoseconds; changes
//	    24     4  CRC-32C of bytes 28 to 511
//	    28     4  number of images
//	    32     8  snapshot id, never used twice in a catalogue
//	    40     2  length of the name
//	    42     2  length of the note
//	    44    64  name
//	   108   404  note: bytes of the caller's
//
// Header of a layer's file, or an overlay's, 4096 bytes
//
//	offset  size  field
//	     0     8  "blksnapL", of an overlay "blksnapO"; stored last, and zeroed
//	              first when the file goes
//	     8     4  version, 2
//	    12     4  CRC-32C of bytes 8 to 11 and 16 to 63
//	    16     8  number of the layer, ascending in a device
//	    24     8  size of the image in bytes
//	    32     8  id of the snapshot
//	    40     8  1 if the image is writable: an overlay has the layer's number
//	    48     8  blocks that the snapshot may take of the snapstore, 0: no limit
//	    56     8  random: no other layer has it
//	    64     8  number of the image in the change tracking; written before the
//	              snapshot's state is 2
//	    72     8  committed: 0, or 1 once the snapshot was live; changes
//	    80     8  fault: 0 healthy, 1 overflowed, 2 failed, 3 destroyed; changes
//	    88     8  length of the reason, written before fault
//	    96   512  reason
//	   608     8  1 while the device is to be rolled back to the image, 2 from when it is
//	              noted that this tears it (tear.go); changes
//	   616     8  1 once the layer is spent (spent.go); then its words mean nothing, and
//	              the file may be cut to 64 KiB
//
// An overlay has nothing in what changes.

package cow

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync/atomic"
	"unsafe"
)

// Errors of state that cannot be used. Each asks its reader for something else.
var (
	// ErrDamaged: it is ours, but does not add up.
	ErrDamaged = errors.New("damaged state")

	// ErrVersion: another version of this program wrote it.
	ErrVersion = errors.New("state of another version of blksnap")
)

const (
	catalogueMagic   = "blksnapC"
	catalogueVersion = 1
	catalogueHeader  = 4096
	recordBytes      = 512

	layerMagic   = "blksnapL"
	overlayMagic = "blksnapO"
	layerVersion = 2
)

// Offsets of the words that change.
const (
	catalogueLastID   = 56
	catalogueDistrust = 64

	recordState = 0
	recordTaken = 8
	recordHeld  = 16

	layerCBT         = 64
	layerCommitted   = 72
	layerFault       = 80
	layerReason      = 88
	layerReasonBytes = 512
	layerRollback    = 608
	layerSpent       = 616
)

// States of a record.
const (
	stateFree = iota
	statePrepared
	stateLive
	stateDying
)

// States of a layer's rollback.
const (
	rollbackNone = iota
	rollbackPending
	rollbackTorn
)

// Kinds of faults.
const (
	faultNone = iota
	faultOverflowed
	faultFailed
	faultDestroyed
)

var (
	crcTable = crc32.MakeTable(crc32.Castagnoli)
	host     = binary.NativeEndian
)

// wordAt is the word at off of mapped memory, which is aligned.
func wordAt(b []byte, off int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&b[off : off+8][0]))
}

// putMagic writes the first 16 bytes of a header whose constant part ends at end,
// the magic last and at once: a header that has it is complete.
func putMagic(b []byte, magic string, version uint32, end int) {
	host.PutUint32(b[8:], version)
	host.PutUint32(b[12:], headerSum(b, end))
	wordAt(b, 0).Store(host.Uint64([]byte(magic)))
}

func headerSum(b []byte, end int) uint32 {
	return crc32.Update(crc32.Checksum(b[8:12], crcTable), crcTable, b[16:end])
}

// errBlank says that a header was never completed, or was taken back.
var errBlank = errors.New("nothing here")

// checkMagic says whether b begins with a sound header.
func checkMagic(b []byte, magic string, version uint32, end int) error {
	if wordAt(b, 0).Load() == 0 {
		return errBlank
	}
	if string(b[:8]) != magic {
		return fmt.Errorf("%w: it does not begin with %q", ErrDamaged, magic)
	}
	if v := host.Uint32(b[8:]); v != version {
		return fmt.Errorf("%w: version %d, this is %d", ErrVersion, v, version)
	}
	if host.Uint32(b[12:]) != headerSum(b, end) {
		return fmt.Errorf("%w: checksum of the header", ErrDamaged)
	}
	return nil
}

// layerHeader is the constant part of a layer's header.
type layerHeader struct {
	number   uint64
	size     int64
	snapshot uint64
	writable bool
	most     int64
	random   uint64
}

const layerConstant = 64

func (h layerHeader) encode(b []byte, magic string) {
	h.put(b[16:])
	putMagic(b, magic, layerVersion, layerConstant)
}

func decodeLayerHeader(b []byte, magic string) (layerHeader, error) {
	if err := checkMagic(b, magic, layerVersion, layerConstant); err != nil {
		return layerHeader{}, err
	}
	return getLayerHeader(b[16:]), nil
}

// put writes the fields from number on.
func (h layerHeader) put(b []byte) {
	host.PutUint64(b, h.number)
	host.PutUint64(b[8:], uint64(h.size))
	host.PutUint64(b[16:], h.snapshot)
	if h.writable {
		host.PutUint64(b[24:], 1)
	}
	host.PutUint64(b[32:], uint64(h.most))
	host.PutUint64(b[40:], h.random)
}

// getLayerHeader reads what put wrote.
func getLayerHeader(b []byte) layerHeader {
	return layerHeader{
		number:   host.Uint64(b),
		size:     int64(host.Uint64(b[8:])),
		snapshot: host.Uint64(b[16:]),
		writable: host.Uint64(b[24:]) == 1,
		most:     int64(host.Uint64(b[32:])),
		random:   host.Uint64(b[40:]),
	}
}

// maxName and maxNote bound what a record holds.
const (
	maxName = 64
	maxNote = 404
)

// recordInfo is the constant part of a record.
type recordInfo struct {
	id     uint64
	images int
	name   string
	note   []byte
}

func (i recordInfo) encode(b []byte) {
	clear(b[24:recordBytes])
	host.PutUint32(b[28:], uint32(i.images))
	host.PutUint64(b[32:], i.id)
	host.PutUint16(b[40:], uint16(copy(b[44:44+maxName], i.name)))
	host.PutUint16(b[42:], uint16(copy(b[108:108+maxNote], i.note)))
	host.PutUint32(b[24:], crc32.Checksum(b[28:recordBytes], crcTable))
}

func decodeRecord(b []byte) (recordInfo, error) {
	name, note := int(host.Uint16(b[40:])), int(host.Uint16(b[42:]))
	if host.Uint32(b[24:]) != crc32.Checksum(b[28:recordBytes], crcTable) || name > maxName || note > maxNote {
		return recordInfo{}, fmt.Errorf("%w: checksum of a record", ErrDamaged)
	}
	return recordInfo{
		id:     host.Uint64(b[32:]),
		images: int(host.Uint32(b[28:])),
		name:   string(b[44 : 44+name]),
		note:   append([]byte(nil), b[108:108+note]...),
	}, nil
}
