// Looking at the memory of a map without using it: nothing is changed, and
// nothing in it is believed.

package cbt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/google/uuid"
)

// Report is what Inspect finds.
type Report struct {
	Generation   uuid.UUID
	Number, Base uint64 // the last snapshot's number, and the base
	Size         int64  // of the device in bytes
	Lost         bool   // marks are missing, and the map says so

	Frozen map[uint64]bool // numbers of the frozen maps

	live int64 // offset of the live map's record
}

// Inspect verifies the map in the size bytes of r as Open does, and changes nothing.
// Errors are those of Open, and of r. It takes memory for each node that a root
// leads to, not for what r claims to hold.
func Inspect(r io.ReaderAt, size int64) (*Report, error) {
	i := inspection{r: r, nodes: size / nodeSize, seen: make(map[node]nodeInfo)}
	if i.nodes < 2 {
		return nil, ErrNoMap
	}
	var head [nodeHeader + nodeHeader]byte
	if err := i.read(head[:], 0); err != nil {
		return nil, err
	}
	if _, err := decodeHeader(head[:nodeHeader]); err != nil {
		return nil, err
	}
	live := binary.NativeEndian.Uint64(head[headerLive:])
	if err := i.tables(link(binary.NativeEndian.Uint64(head[headerTable:]))); err != nil {
		return nil, err
	}
	rep, err := i.report(live)
	if err != nil {
		return nil, err
	}
	for _, rec := range i.records {
		if !rec.counts(rep) {
			continue
		}
		if err := i.node(rec.root, nodeInfo{number: rec.number, base: rec.base}); err != nil {
			return nil, err
		}
	}
	return rep, nil
}

// inspection is the state of Inspect.
type inspection struct {
	r       io.ReaderAt
	nodes   int64
	seen    map[node]nodeInfo
	records []inspectedRecord
}

// inspectedRecord is a record in use.
type inspectedRecord struct {
	history
	off    int64
	commit uint64 // what the header says if it is the live map's
	root   link
	size   int64
	lost   bool
}

func (i *inspection) read(p []byte, off int64) error {
	_, err := i.r.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: it ends early", ErrDamaged)
	}
	return err
}

// tables reads the records of all tables.
func (i *inspection) tables(l link) error {
	var buf [nodeSize]byte
	for l != 0 {
		if l.level() != tableLevel {
			return fmt.Errorf("%w: table %d has level %d", ErrDamaged, l.node(), l.level())
		}
		if _, again := i.seen[l.node()]; again {
			return fmt.Errorf("%w: table %d is linked twice", ErrDamaged, l.node())
		}
		if _, err := i.load(l, buf[:]); err != nil {
			return err
		}
		for off := int64(nodeHeader); off < nodeSize; off += recordSize {
			if err := i.record(buf[off:off+recordSize], l.node().offset()+off); err != nil {
				return err
			}
		}
		l = link(binary.NativeEndian.Uint64(buf[nodeNext:]))
	}
	return nil
}

// record notes the record at off, if it is in use.
func (i *inspection) record(p []byte, off int64) error {
	state := binary.NativeEndian.Uint64(p[recordState:])
	if state == stateFree {
		return nil
	}
	h, ok := decodeHistory(p)
	if !ok {
		return fmt.Errorf("%w: checksum of the record at %d", ErrDamaged, off)
	}
	if state > stateLost {
		return fmt.Errorf("%w: state %d of the record at %d", ErrDamaged, state, off)
	}
	size := int64(binary.NativeEndian.Uint64(p[recordBytes:]))
	if err := checkSize(size); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	i.records = append(i.records, inspectedRecord{
		history: h, off: off, commit: commitWord(off, p), size: size, lost: state == stateLost,
		root: link(binary.NativeEndian.Uint64(p[recordRoot:])),
	})
	return nil
}

// load reads the node that l leads to, which begins with p.
func (i *inspection) load(l link, p []byte) (nodeInfo, error) {
	if l.node() == 0 || int64(l.node()) >= i.nodes {
		return nodeInfo{}, fmt.Errorf("%w: no node %d", ErrDamaged, l.node())
	}
	if err := i.read(p, l.node().offset()); err != nil {
		return nodeInfo{}, err
	}
	info, ok := decodeNode(p[:nodeHeader])
	if !ok {
		return nodeInfo{}, fmt.Errorf("%w: checksum of node %d", ErrDamaged, l.node())
	}
	if info.level != l.level() || info.epoch != l.epoch() {
		return nodeInfo{}, fmt.Errorf("%w: node %d is not the one that was linked", ErrDamaged, l.node())
	}
	i.seen[l.node()] = info
	return info, nil
}

// node verifies the node that l leads to, and at first sight what is below it; limit
// is as for walk.node.
func (i *inspection) node(l link, limit nodeInfo) error {
	if l == 0 {
		return nil
	}
	info, again := i.seen[l.node()]
	n := nodeSize
	if l.level() == 0 {
		n = nodeHeader // each byte of a leaf's map is a valid one
	}
	buf := make([]byte, n)
	if !again {
		var err error
		if info, err = i.load(l, buf); err != nil {
			return err
		}
	} else if info.level != l.level() || info.epoch != l.epoch() {
		return fmt.Errorf("%w: node %d is not the one that was linked", ErrDamaged, l.node())
	}
	if !info.fits(limit) {
		return fmt.Errorf("%w: node %d is not where it belongs", ErrDamaged, l.node())
	}
	if again || info.level == 0 {
		return nil
	}
	below := info
	for b := int64(0); b < 1<<indexBits; b++ {
		c := link(binary.NativeEndian.Uint64(buf[nodeHeader+b*8:]))
		if c != 0 && c.level() != info.level-1 {
			return fmt.Errorf("%w: node %d links to level %d", ErrDamaged, l.node(), c.level())
		}
		below.first = limit.first + b<<spanBits(info.level-1)
		if err := i.node(c, below); err != nil {
			return err
		}
	}
	return nil
}

// report finds the live map among the records, and its frozen ones.
func (i *inspection) report(live uint64) (*Report, error) {
	var rep *Report
	for _, rec := range i.records {
		if rec.off == commitOffset(live) && rec.commit == live {
			rep = &Report{
				Generation: rec.generation, Number: rec.number - 1, Base: rec.base, Size: rec.size, Lost: rec.lost,
				Frozen: make(map[uint64]bool), live: rec.off,
			}
		}
	}
	if rep == nil {
		return nil, fmt.Errorf("%w: no live map", ErrDamaged)
	}
	for _, rec := range i.records {
		if rec.off != rep.live && rec.counts(rep) {
			rep.Frozen[rec.number] = true
		}
	}
	return rep, nil
}

// counts says whether the record is the live map's or that of a frozen one; others are
// what a killed Freeze or Reset left (walk.roots).
func (r inspectedRecord) counts(rep *Report) bool {
	switch {
	case r.off == rep.live:
		return true
	case r.number > rep.Number:
		return false
	}
	return r.number != rep.Base || r.generation == rep.Generation
}
