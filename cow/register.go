// The register of a device's layers: which there are, in a file beside theirs.
//
// An image reads through its own layer and all newer ones. Where the file of one is
// gone, emptied, or another one by the time of the next start, nothing in the files that
// are left says so: what was preserved there would be looked for in the origin, which
// has changed since. So each layer is entered here after its file is made and before its
// snapshot is live, and taken out before its file goes. A start gives up the images that
// need a layer which is entered and not found; a file that is not entered is nobody's.
//
// A layer is known by a random number in its header, which its image's overlay has as
// well. (A copy of its own file from an earlier moment is not told from it.)
//
// The file is mapped. Numbers are in the machine's byte order.
//
//	offset  size  field
//	     0     8  "blksnapI"
//	     8     4  version, 1
//	    12     4  CRC-32C of bytes 8 to 11 and 16 to 23
//	    16     8  zero
//	   128     …  entries of 128 bytes
//
// Entry
//
//	     0     8  1: in use, stored last; 2: the layer is spent, so no image needs it;
//	              else 0; changes
//	     8     8  number of the image in the change tracking, known later than the
//	              rest; changes
//	    16    48  bytes 16 to 63 of the layer's header
//	    64     4  CRC-32C of bytes 16 to 63
//	    68    60  zero

package cow

import (
	"cmp"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"slices"
	"sync"
)

const (
	registerName    = "layers"
	registerMagic   = "blksnapI"
	registerVersion = 1
	registerHeader  = 24 // end of what the checksum covers
	entryBytes      = 128
)

// Offsets in an entry.
const (
	entryUsed  = 0
	entryCBT   = 8
	entryConst = 16
	entrySum   = 64
)

// What entryUsed says of an entry that is in use.
const (
	entryInUse = 1
	entrySpent = 2
)

// entered is what the register says of a layer.
type entered struct {
	layerHeader
	cbt   uint64
	spent bool
	at    int64 // offset of the entry
}

// register is the register of one device; nil where nothing outlives the process.
type register struct {
	mem *memory

	// mu serializes looking for free entries.
	mu sync.Mutex
}

// maxRegister bounds the address space of a register.
const maxRegister = 1 << 30

// openRegister opens the register at path; errBlank where there is none.
func openRegister(path string) (*register, error) {
	f, err := openInspected(path)
	if err != nil {
		return nil, err
	}
	if f == nil {
		return nil, errBlank
	}
	err = errors.Join(f.stepped(), f.Close())
	if err != nil {
		return nil, err
	}
	r := &register{}
	if r.mem, err = mapFile(path, maxRegister); err != nil {
		return nil, err
	}
	if err := checkMagic(r.mem.Bytes(), registerMagic, registerVersion, registerHeader); err != nil {
		return nil, errors.Join(err, r.mem.Close())
	}
	return r, nil
}

// newRegister makes an empty register at path, in place of what is there; none where path
// is empty.
func newRegister(path string) (*register, error) {
	if path == "" {
		return nil, nil
	}
	if err := os.RemoveAll(path); err != nil {
		return nil, err
	}
	r := &register{}
	var err error
	if r.mem, err = mapFile(path, maxRegister); err != nil {
		return nil, err
	}
	if err := r.mem.Grow(memoryStep); err != nil {
		return nil, errors.Join(err, r.mem.Close())
	}
	putMagic(r.mem.Bytes(), registerMagic, registerVersion, registerHeader)
	return r, nil
}

func (r *register) close() error {
	if r == nil {
		return nil
	}
	return r.mem.Close()
}

func (r *register) entry(at int64) []byte { return r.mem.Bytes()[at : at+entryBytes] }

// add enters a layer, which is taken out with its table (table.forget).
func (r *register) add(l *layer) error {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	at, err := r.freeLocked()
	if err != nil {
		return err
	}
	b := r.entry(at)
	clear(b)
	l.header().put(b[entryConst:])
	host.PutUint32(b[entrySum:], crc32.Checksum(b[entryConst:entrySum], crcTable))
	wordAt(b, entryCBT).Store(l.cbt())
	used := uint64(entryInUse)
	if l.table.spent() {
		used = entrySpent
	}
	wordAt(b, entryUsed).Store(used)
	l.table.register, l.table.entry = r, at
	return nil
}

// freeLocked finds a free entry.
func (r *register) freeLocked() (int64, error) {
	for at := int64(entryBytes); ; at += entryBytes {
		if at+entryBytes > r.mem.Len() {
			if err := r.mem.Grow(memoryStep); err != nil {
				return 0, err
			}
		}
		if wordAt(r.entry(at), entryUsed).Load() == 0 {
			return at, nil
		}
	}
}

// remove takes an entry out.
func (r *register) remove(at int64) { wordAt(r.entry(at), entryUsed).Store(0) }

// spend notes that a layer is spent.
func (r *register) spend(at int64) { wordAt(r.entry(at), entryUsed).Store(entrySpent) }

// setCBT notes the image's number.
func (r *register) setCBT(at int64, number uint64) { wordAt(r.entry(at), entryCBT).Store(number) }

// list returns the layers that are entered, by ascending number. ErrDamaged says that
// there are entries which cannot be read.
func (r *register) list() (list []entered, err error) {
	for at := int64(entryBytes); at+entryBytes <= r.mem.Len(); at += entryBytes {
		e, used, derr := decodeEntry(r.entry(at))
		e.at = at
		switch {
		case derr != nil:
			err = derr
		case used:
			list = append(list, e)
		}
	}
	slices.SortFunc(list, func(a, b entered) int { return cmp.Compare(a.number, b.number) })
	return list, err
}

// decodeEntry also says whether the entry is in use.
func decodeEntry(b []byte) (e entered, used bool, err error) {
	switch n := wordAt(b, entryUsed).Load(); {
	case n == 0:
		return e, false, nil
	case n > entrySpent || host.Uint32(b[entrySum:]) != crc32.Checksum(b[entryConst:entrySum], crcTable):
		return e, false, fmt.Errorf("%w: an entry of the register of layers", ErrDamaged)
	}
	e.layerHeader = getLayerHeader(b[entryConst:])
	e.cbt = wordAt(b, entryCBT).Load()
	e.spent = wordAt(b, entryUsed).Load() == entrySpent
	return e, true, nil
}

// check says whether h, of a layer or an overlay, is that of what was entered.
func (e entered) check(h layerHeader) error {
	if h != e.layerHeader {
		return fmt.Errorf("%w: it was replaced by another file", ErrDamaged)
	}
	return nil
}
