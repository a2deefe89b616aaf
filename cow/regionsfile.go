// The file that the record of regions is.
//
// The record is a file that never changes its size, so that an fsync has nothing
// to do but to write a few sectors. Numbers are little-endian.
//
//	offset  size  field
//	     0   512  header
//	   512   512  header; the sound one with the higher sequence number counts
//	  4096     …  first set of regions
//	     …     …  second set
//
// Header
//
//	offset  size  field
//	     0     8  "blksnapR"
//	     8     4  version, 1
//	    12     4  CRC-32C of bytes 0 to 11 and 16 to 511
//	    16     8  sequence number
//	    24     8  size of the device in bytes
//	    32    16  generation of the change map
//	    48     8  number that no snapshot exceeds
//	    56     8  lease: until when our own writes may stamp the origin, in
//	              nanoseconds since 1970
//	    64     4  which set counts: 0 or 1
//	    68     4  zero
//
// Set: pages of 512 bytes
//
//	offset  size  field
//	     0   508  a bit for each region
//	   508     4  CRC-32C of bytes 0 to 507; a page that does not add up counts as
//	              all ones

package cow

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"path/filepath"

	"github.com/google/uuid"
)

const (
	regionsMagic   = "blksnapR"
	regionsVersion = 1
	regionsHeader  = 512
	regionsSets    = 4096

	regionPage     = 512
	regionPageBits = 508 * 8
)

// reserveStep is how many numbers are reserved at a time.
const reserveStep = 16

// regionsState is the content of a header.
type regionsState struct {
	seq        uint64
	size       int64
	generation uuid.UUID
	number     uint64
	lease      int64
	set        uint32
}

// createRegions makes an empty record, durably, in the place of what is at path.
func createRegions(disk stateDisk, path string, st regionsState) (*regions, error) {
	f, err := disk.open(path+".new", true)
	if err != nil {
		return nil, err
	}
	r := newRegions(f, st.size)
	r.state = st
	_, err = f.WriteAt(zeroes[:regionsSets], 0)
	for set := range uint32(2) {
		err = errors.Join(err, r.writeSet(set))
	}
	if err == nil {
		err = r.writeHeader()
	}
	if err == nil {
		err = disk.rename(path+".new", path)
	}
	if err == nil {
		err = disk.syncDir(filepath.Dir(path))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return r, nil
}

// openRegions opens the record at path.
func openRegions(disk stateDisk, path string) (*regions, error) {
	f, err := disk.open(path, false)
	if err != nil {
		return nil, err
	}
	r, err := readRegions(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return r, nil
}

func readRegions(f durableFile) (*regions, error) {
	st, sure, err := readHeaders(f)
	if err != nil {
		return nil, err
	}
	r := newRegions(f, st.size)
	r.state, r.halved = st, !sure
	for p := range r.pages() {
		r.readPage(st.set, p)
		if !sure {
			r.readPage(st.set^1, p)
		}
	}
	// Who wrote them last is not known: they stay until they were idle once.
	for i := range r.active {
		r.active[i].Store(r.recorded[i].Load())
	}
	return r, nil
}

// readHeaders returns the newer of the headers. Where the other is damaged or gone, it may
// have been the newer one: then it is not sure which set counts, and the number is
// raised by more than one header differs from the next.
func readHeaders(f durableFile) (st regionsState, sure bool, err error) {
	var sound, damaged, blank int
	err = fmt.Errorf("%w: record of regions: no sound header", ErrDamaged)
	for at := range int64(2) {
		var b [regionsHeader]byte
		_, rerr := f.ReadAt(b[:], at*regionsHeader)
		switch h, derr := decodeRegions(b[:]); {
		case rerr != nil: // which says nothing of what is there
			damaged++
		case derr == nil:
			sound++
			if sound == 1 || h.seq > st.seq {
				st = h
			}
		case errors.Is(derr, ErrVersion):
			err = derr
			damaged++
		case b != [regionsHeader]byte{}:
			damaged++
		default:
			blank++
		}
	}
	if sound == 0 {
		return st, false, err
	}
	if st.seq > 1 { // so both have been written
		damaged += blank
	}
	if damaged > 0 {
		st.number += 2 * reserveStep
	}
	return st, damaged == 0, nil
}

// heal makes a record whole that was found with a damaged header. The next header is
// written over that one and says which set counts: until it does, both sets do, so that
// set must hold first what the other one has. Who is told that a region is recorded
// relies on it.
func (r *regions) heal() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.halved {
		return nil
	}
	err := errors.Join(r.writeSet(0), r.writeSet(1))
	if err == nil {
		err = r.file.Sync()
	}
	if err == nil {
		err = r.writeHeader()
	}
	if err != nil {
		return fmt.Errorf("record of regions: replace a damaged header: %w", err)
	}
	r.halved = false
	return nil
}

// readPage adds what a page of a set has to what is recorded.
func (r *regions) readPage(set uint32, p int64) {
	var b [regionPage]byte
	_, err := r.file.ReadAt(b[:], r.pageAt(set, p))
	all := err != nil || binary.LittleEndian.Uint32(b[508:]) != crc32.Checksum(b[:508], crcTable)
	for i := p * regionPageBits; i < min((p+1)*regionPageBits, r.n); i++ {
		if k := i - p*regionPageBits; all || b[k/8]>>(k%8)&1 != 0 {
			setBit(r.recorded, i)
		}
	}
}

func (st regionsState) encode(b []byte) {
	clear(b)
	copy(b, regionsMagic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], regionsVersion)
	le.PutUint64(b[16:], st.seq)
	le.PutUint64(b[24:], uint64(st.size))
	copy(b[32:48], st.generation[:])
	le.PutUint64(b[48:], st.number)
	le.PutUint64(b[56:], uint64(st.lease))
	le.PutUint32(b[64:], st.set)
	le.PutUint32(b[12:], sumWithout(b))
}

// sumWithout is the checksum of a header without the field that holds it.
func sumWithout(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:12], crcTable), crcTable, b[16:])
}

func decodeRegions(b []byte) (regionsState, error) {
	le := binary.LittleEndian
	switch {
	case string(b[:8]) != regionsMagic:
		return regionsState{}, fmt.Errorf("%w: record of regions: no magic", ErrDamaged)
	case le.Uint32(b[8:]) != regionsVersion:
		return regionsState{}, fmt.Errorf("%w: record of regions: version %d, this is %d", ErrVersion, le.Uint32(b[8:]), regionsVersion)
	case le.Uint32(b[12:]) != sumWithout(b[:regionsHeader]):
		return regionsState{}, fmt.Errorf("%w: record of regions: checksum of a header", ErrDamaged)
	}
	st := regionsState{
		seq: le.Uint64(b[16:]), size: int64(le.Uint64(b[24:])), number: le.Uint64(b[48:]),
		lease: int64(le.Uint64(b[56:])), set: le.Uint32(b[64:]),
	}
	copy(st.generation[:], b[32:48])
	if st.size <= 0 || st.set > 1 {
		return regionsState{}, fmt.Errorf("%w: record of regions: size %d, set %d", ErrDamaged, st.size, st.set)
	}
	return st, nil
}

func (r *regions) pages() int64    { return (r.n + regionPageBits - 1) / regionPageBits }
func (r *regions) setBytes() int64 { return r.pages() * regionPage }

func (r *regions) pageAt(set uint32, p int64) int64 {
	return regionsSets + int64(set)*r.setBytes() + p*regionPage
}

// writePage writes a page of the regions that are kept and, of those of more that are not
// recorded yet, the ones that are in it.
func (r *regions) writePage(set uint32, p int64, more []int64) error {
	var b [regionPage]byte
	put := func(i int64) {
		if k := i - p*regionPageBits; k >= 0 && k < regionPageBits {
			b[k/8] |= 1 << (k % 8)
		}
	}
	for i := p * regionPageBits; i < min((p+1)*regionPageBits, r.n); i++ {
		if r.isKept(i) {
			put(i)
		}
	}
	for _, i := range more {
		put(i)
	}
	binary.LittleEndian.PutUint32(b[508:], crc32.Checksum(b[:508], crcTable))
	_, err := r.file.WriteAt(b[:], r.pageAt(set, p))
	return err
}

func (r *regions) writeSet(set uint32) error {
	for p := range r.pages() {
		if err := r.writePage(set, p, nil); err != nil {
			return err
		}
	}
	return nil
}

// writeHeader makes the state durable, over the older of the two headers.
func (r *regions) writeHeader() error {
	r.state.seq++
	var b [regionsHeader]byte
	r.state.encode(b[:])
	_, err := r.file.WriteAt(b[:], int64(r.state.seq%2)*regionsHeader)
	if err == nil {
		err = r.file.Sync()
	}
	r.unsure = cmp.Or(r.unsure, err)
	return r.unsure
}
