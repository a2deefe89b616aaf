// Verifying what is kept in the run and the state directory, without using it: by
// its files alone, which are read, never mapped, and never changed.
//
// Nothing in them is believed. What memory it takes is bounded by what the files
// really hold: a node, a word or a name that is there.
//
// It may be done beside a process that uses the files. Then a look at one file is of
// another moment than a look at the next, so what it finds counts only if it is found
// again and again (Inspect's caller does that).

package cow

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"blksnap/store"
)

// Problem is something in the state that does not add up.
type Problem struct {
	File   string
	Text   string // what is wrong
	Advice string // what to do
}

// Inspection says where the state is, and what its words are compared with.
type Inspection struct {
	Run, State string // directories; State is empty where it is not to be looked at

	// Slots is how many slots a part of the snapstore has, or says why it has none.
	Slots func(part uint8) (int64, error)

	// Used is which blocks of a slot are in use; nil where nobody knows.
	Used func(store.Slot) uint16
}

// maxProblems is how many problems of one file are told of, one by one.
const maxProblems = 20

// Advice that several problems have.
const (
	adviceSnapshots  = "start the daemon anew: it gives up the snapshots that need it; destroy them"
	adviceDevice     = "start the daemon anew: it gives up the device's snapshots; destroy them, and make a full copy if cbt show has a new generation"
	adviceGeneration = "start the daemon anew: where it begins a new generation, make a full copy"
)

// Inspect verifies all of the engine's state and returns what is wrong with it.
func (i Inspection) Inspect() ([]Problem, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	w := inspector{Inspection: i, boot: boot, told: make(map[string]int), snapshots: make(map[uint64]string)}
	if w.catalogue() {
		w.eachDevice(i.Run, func(name, dir string) {
			if !slices.Contains(w.distrusted, distrustWord(name)) {
				w.runDevice(name, dir)
			}
		})
		w.slots()
	}
	if i.State != "" {
		w.eachDevice(i.State, w.stateDevice)
	}
	return w.problems, nil
}

// inspector is the state of an inspection.
type inspector struct {
	Inspection
	boot       string
	problems   []Problem
	told       map[string]int    // problems of each file
	snapshots  map[uint64]string // names of those that are live, by id
	distrusted []uint64          // words of the devices whose files nobody believes

	tables []inspectedTable
	named  []namedSlot
}

// inspectedTable is the table of a layer or an overlay.
type inspectedTable struct {
	path    string
	device  string
	number  uint64
	overlay bool
}

// namedSlot is a slot that a table names.
type namedSlot struct {
	word  word
	table int32
	chunk chunkNo
}

func (w *inspector) tell(path, advice, format string, args ...any) {
	n := w.told[path] + 1
	w.told[path] = n
	switch {
	case n < maxProblems:
		w.problems = append(w.problems, Problem{path, fmt.Sprintf(format, args...), advice})
	case n == maxProblems:
		w.problems = append(w.problems, Problem{path, "more of the kind", advice})
	}
}

// inspectedFile is a file of the state, open to be read.
type inspectedFile struct {
	*os.File
	path string
	size int64
}

// openInspected opens a regular file; nil, without an error, where there is none.
func openInspected(path string) (*inspectedFile, error) {
	f, err := openState(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, cause(err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("it is not a regular file")
	}
	if err != nil {
		f.Close()
		return nil, cause(err)
	}
	return &inspectedFile{f, path, st.Size()}, nil
}

// open is openInspected that tells what is wrong. It returns nil where there is nothing
// to look at.
func (w *inspector) open(path, advice string) *inspectedFile {
	f, err := openInspected(path)
	if err != nil {
		w.tell(path, advice, "%v", err)
	}
	return f
}

// head reads the first n bytes.
func (f *inspectedFile) head(n int) ([]byte, error) {
	b := make([]byte, n)
	_, err := f.ReadAt(b, 0)
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: it ends after %d bytes", ErrDamaged, f.size)
	}
	return b, cause(err)
}

// blank says whether nothing was written to the file yet, or it was emptied.
func (f *inspectedFile) blank() bool {
	var b [8]byte
	n, err := f.ReadAt(b[:], 0)
	return (err == nil || errors.Is(err, io.EOF) && n == 0) && b == [8]byte{}
}

// stepped says whether a mapped file is as long as one can be.
func (f *inspectedFile) stepped() error {
	if f.size == 0 || f.size%memoryStep != 0 {
		return fmt.Errorf("%w: it is cut short, to %d bytes", ErrDamaged, f.size)
	}
	return nil
}

// eachDevice calls f for each device that keeps something in dir.
func (w *inspector) eachDevice(dir string, f func(name, dir string)) {
	if dir == "" {
		return
	}
	dir = filepath.Join(dir, "devices")
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		w.tell(dir, "see to it that it can be read", "%v", cause(err))
	}
	for _, e := range entries {
		if e.IsDir() {
			f(e.Name(), filepath.Join(dir, e.Name()))
		}
	}
}

// catalogue verifies the catalogue and says whether the run directory is of this boot.
// What is left of another is looked at by nobody.
func (w *inspector) catalogue() bool {
	if w.Run == "" {
		return false
	}
	path := filepath.Join(w.Run, "catalogue")
	const advice = "start the daemon anew: it begins a new one; the snapshots are lost, and devices that were written to begin a new generation"
	f := w.open(path, advice)
	if f == nil {
		if w.told[path] == 0 && anyLayer(w.Run) {
			w.tell(path, advice, "it is not there, and layers are")
		}
		return true // devices without a catalogue are looked at all the same
	}
	defer f.Close()
	if entries, err := os.ReadDir(filepath.Join(w.Run, "devices")); f.blank() && (errors.Is(err, os.ErrNotExist) || err == nil && len(entries) == 0) {
		return true // the first start in this boot has not come to it
	}
	b, err := f.head(catalogueHeader)
	if err == nil {
		err = checkMagic(b, catalogueMagic, catalogueVersion, catalogueConstant)
	}
	if err == nil && string(b[16:catalogueConstant]) != w.boot {
		return false
	}
	if err == nil {
		err = f.stepped()
	}
	if err != nil {
		w.tell(path, advice, "%v", err)
		return true
	}
	for at := catalogueDistrust; at < catalogueHeader; at += 8 {
		w.distrusted = append(w.distrusted, host.Uint64(b[at:]))
	}
	w.records(f, host.Uint64(b[catalogueLastID:]))
	return true
}

// records verifies the records of snapshots.
func (w *inspector) records(f *inspectedFile, last uint64) {
	names := make(map[string]bool)
	b := make([]byte, recordBytes)
	for off := int64(catalogueHeader); off < f.size; off += recordBytes {
		if _, err := f.ReadAt(b, off); err != nil {
			w.tell(f.path, adviceSnapshots, "%v", cause(err))
			return
		}
		state := record(b).state()
		if state == stateFree {
			continue
		}
		info, err := decodeRecord(b)
		switch {
		case state > stateDying:
			err = fmt.Errorf("%w: state %d of a record", ErrDamaged, state)
		case err != nil || state != stateLive:
		case info.id == 0 || info.id > last || w.snapshots[info.id] != "":
			err = fmt.Errorf("%w: id %d of snapshot %q", ErrDamaged, info.id, info.name)
		case names[info.name]:
			err = fmt.Errorf("%w: two snapshots have the name %q", ErrDamaged, info.name)
		default:
			w.snapshots[info.id], names[info.name] = info.name, true
		}
		if err != nil {
			w.tell(f.path, adviceSnapshots, "at %d: %v", off, err)
		}
	}
}

// slots compares the slots that tables name with each other, and with the snapstore.
func (w *inspector) slots() {
	slices.SortFunc(w.named, func(a, b namedSlot) int {
		return cmp.Or(cmp.Compare(a.word.slot(), b.word.slot()), cmp.Compare(a.table, b.table), cmp.Compare(a.chunk, b.chunk))
	})
	for n, s := range w.named {
		path := w.tables[s.table].path
		if n > 0 && s.word.slot() == w.named[n-1].word.slot() && !w.moving(w.named[n-1], s) {
			w.tell(path, adviceSnapshots, "chunk %d is in slot %v, which chunk %d of %s is in, too",
				s.chunk, s.word.slot(), w.named[n-1].chunk, w.tables[w.named[n-1].table].path)
		}
		if w.Used == nil {
			continue
		}
		if used := w.Used(s.word.slot()); s.word.mask()&^used != 0 {
			w.tell(path, "destroy the device's snapshots", "chunk %d has blocks %016b in slot %v, where %016b are in use",
				s.chunk, s.word.mask(), s.word.slot(), used)
		}
	}
}

// moving says whether a word was on its way from the newer layer b to the older layer a,
// which a start ends.
func (w *inspector) moving(a, b namedSlot) bool {
	older, newer := w.tables[a.table], w.tables[b.table]
	if older.number > newer.number {
		older, newer, a, b = newer, older, b, a
	}
	return older.device == newer.device && !older.overlay && !newer.overlay && older.number < newer.number &&
		a.chunk == b.chunk && b.word.mask()&^a.word.mask() == 0
}
