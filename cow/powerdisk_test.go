// Disks that lose power: the origin and the file system of the state directory, in
// memory, with a journal of everything that changes them.
//
// What was not flushed when power is lost may be there afterwards or not, each sector
// for itself and in any order: of each sector any content that it had since its file
// was last synced; of each directory any of the changes that came since it was synced;
// of a file's size and times any that they had. (No file system is that bad. Whoever
// relies on nothing else is safe on all of them.)

package cow

import (
	"crypto/sha256"
	"encoding/binary"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"
)

// sector is the content of one. It never changes: a write replaces it.
type sector = [SectorSize]byte

// inode is a file or a directory: as the running machine sees it, and as it was when
// the machine was started.
type inode struct {
	inodeState
	was inodeState
}

type inodeState struct {
	sectors map[int64]*sector // nil: a hole
	size    int64
	changed int64             // time of the last change, in nanoseconds
	attr    uuid.UUID         // the generation that has ended
	names   map[string]*inode // of a directory
}

func (s inodeState) clone() inodeState {
	s.sectors, s.names = maps.Clone(s.sectors), maps.Clone(s.names)
	return s
}

func newNode(size int64) *inode {
	return &inode{inodeState: inodeState{sectors: make(map[int64]*sector), size: size}}
}

func newDir() *inode { return &inode{inodeState: inodeState{names: make(map[string]*inode)}} }

// put stores sectors.
func (s *inodeState) put(list []placed) {
	for _, p := range list {
		if p.content == nil {
			delete(s.sectors, p.no)
		} else {
			s.sectors[p.no] = p.content
		}
	}
}

// resize cuts what is beyond size.
func (s *inodeState) resize(size int64) {
	if size < s.size {
		maps.DeleteFunc(s.sectors, func(no int64, _ *sector) bool { return no*SectorSize >= size })
	}
	s.size = size
}

// placed is a sector's content at a place.
type placed struct {
	no      int64
	content *sector
}

// diskOp is one change of an inode, or a sync of it.
type diskOp struct {
	what string
	node *inode

	sectors  []placed          // write: what they hold then
	size     int64             // size
	changed  int64             // stamp
	attr     uuid.UUID         // attr
	names    map[string]*inode // names: nil for a name that goes
	covers   int               // sync: up to which operation, of the node's
	complete bool              // sync: times and attributes, too
}

// apply makes the change in s.
func (o *diskOp) apply(s *inodeState) {
	switch o.what {
	case "write":
		s.put(o.sectors)
	case "size":
		s.resize(o.size)
	case "stamp":
		s.changed = o.changed
	case "attr":
		s.attr = o.attr
	case "names":
		for name, node := range o.names {
			if node == nil {
				delete(s.names, name)
			} else {
				s.names[name] = node
			}
		}
	}
}

// disks are the disks of a machine: an origin and the root of a state directory.
type disks struct {
	origin *inode
	root   *inode

	// before, if set, is called before each call of the state disk that changes
	// something, and may wait. An error fails the call; a write that fails has
	// changed nothing.
	before func(what string) error

	// looking, if set, is called before each call that changes nothing.
	looking func(what string) error

	// pause, if set, is called before each write of the origin, and may wait.
	pause atomic.Pointer[func()]

	counts atomic.Bool  // what is written to the origin
	wrote  atomic.Int64 // sectors

	// mu protects the journal and the inodes.
	mu  sync.Mutex
	ops []*diskOp
}

func newDisks(size int64) *disks {
	d := &disks{origin: newNode(size), root: newDir()}
	d.origin.changed = time.Now().UnixNano()
	d.boot()
	return d
}

// boot notes what is there when the machine starts.
func (d *disks) boot() {
	var walk func(n *inode)
	walk = func(n *inode) {
		n.was = n.inodeState.clone()
		for _, c := range n.names {
			walk(c)
		}
	}
	walk(d.origin)
	walk(d.root)
}

func (d *disks) length() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.ops)
}

func (d *disks) doLocked(o *diskOp) {
	o.apply(&o.node.inodeState)
	d.ops = append(d.ops, o)
}

// ask is before.
func (d *disks) ask(what string) error {
	if d.before == nil {
		return nil
	}
	return d.before(what)
}

// askLook is looking.
func (d *disks) askLook(what string) error {
	if d.looking == nil {
		return nil
	}
	return d.looking(what)
}

// write writes p to a file.
func (d *disks) writeLocked(n *inode, p []byte, off int64) {
	end := off + int64(len(p))
	if end > n.size {
		d.doLocked(&diskOp{what: "size", node: n, size: end})
	}
	var list []placed
	for no := off / SectorSize; no*SectorSize < end; no++ {
		s := new(sector)
		if was := n.sectors[no]; was != nil {
			*s = *was
		}
		from := max(off, no*SectorSize)
		copy(s[from-no*SectorSize:], p[from-off:])
		list = append(list, placed{no, s})
	}
	d.doLocked(&diskOp{what: "write", node: n, sectors: list})
}

func (d *disks) readLocked(n *inode, p []byte, off int64) (int, error) {
	m := int(min(int64(len(p)), max(0, n.size-off)))
	for at := 0; at < m; {
		no, skip := (off+int64(at))/SectorSize, (off+int64(at))%SectorSize
		k := min(m-at, SectorSize-int(skip))
		if s := n.sectors[no]; s != nil {
			copy(p[at:at+k], s[skip:])
		} else {
			clear(p[at : at+k])
		}
		at += k
	}
	if m < len(p) {
		return m, io.EOF
	}
	return m, nil
}

// sync notes that all that was done to n before begun is durable.
func (d *disks) syncLocked(n *inode, begun int, complete bool) {
	d.doLocked(&diskOp{what: "sync", node: n, covers: begun, complete: complete})
}

// afterCut is what the disks hold when power is lost after the first k operations.
// Each change that was not flushed survives with a probability of p.
func (d *disks) afterCut(k int, p float64, rng *rand.Rand) *disks {
	d.mu.Lock()
	defer d.mu.Unlock()
	pending := make(map[*inode][]int) // by node, what is not durable
	durable := make(map[*inode]*inodeState)
	of := func(n *inode) *inodeState {
		if durable[n] == nil {
			s := n.was.clone()
			if s.sectors == nil && s.names == nil { // it came into being since
				if n.names != nil {
					s.names = make(map[string]*inode)
				} else {
					s.sectors = make(map[int64]*sector)
				}
			}
			durable[n] = &s
		}
		return durable[n]
	}
	for i, o := range d.ops[:k] {
		if o.what != "sync" {
			pending[o.node] = append(pending[o.node], i)
			continue
		}
		pending[o.node] = slices.DeleteFunc(pending[o.node], func(i int) bool {
			c := d.ops[i]
			if i >= o.covers || !o.complete && (c.what == "stamp" || c.what == "attr") {
				return false
			}
			c.apply(of(o.node))
			return true
		})
	}
	var survive func(n *inode) *inode
	survive = func(n *inode) *inode {
		s := of(n)
		for _, i := range pending[n] {
			d.ops[i].applySome(s, p, rng)
		}
		maps.DeleteFunc(s.sectors, func(no int64, _ *sector) bool { return no*SectorSize >= s.size })
		for name, c := range s.names {
			s.names[name] = survive(c)
		}
		return &inode{inodeState: *s}
	}
	left := &disks{origin: survive(d.origin), root: survive(d.root)}
	left.boot()
	return left
}

// applySome is apply for each part of the change with a probability of p.
func (o *diskOp) applySome(s *inodeState, p float64, rng *rand.Rand) {
	if o.what != "write" {
		if rng.Float64() < p {
			o.apply(s)
		}
		return
	}
	whole := rng.IntN(2) == 0 // all of it or nothing
	if whole && rng.Float64() >= p {
		return
	}
	for i := range o.sectors {
		if whole || rng.Float64() < p {
			s.put(o.sectors[i : i+1])
		}
	}
}

// find returns the directory that path is in and what it is called there.
func (d *disks) findLocked(name string) (dir *inode, base string, err error) {
	dir = d.root
	parts := strings.Split(strings.Trim(path.Clean(name), "/"), "/")
	for _, part := range parts[:len(parts)-1] {
		if dir = dir.names[part]; dir == nil {
			return nil, "", fs.ErrNotExist
		}
	}
	return dir, parts[len(parts)-1], nil
}

func (d *disks) nodeLocked(name string) (*inode, error) {
	if path.Clean(name) == "/" {
		return d.root, nil
	}
	dir, base, err := d.findLocked(name)
	if err == nil && dir.names[base] == nil {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, err
	}
	return dir.names[base], nil
}

func (d *disks) open(name string, create bool) (durableFile, error) {
	if create {
		if err := d.ask("create " + name); err != nil {
			return nil, err
		}
	} else if err := d.askLook("open " + name); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n, err := d.nodeLocked(name)
	switch {
	case !create && err != nil:
		return nil, err
	case err == nil && n.names != nil:
		return nil, syscall.EISDIR
	case create && err == nil:
		d.doLocked(&diskOp{what: "size", node: n})
	case create:
		dir, base, err := d.findLocked(name)
		if err != nil {
			return nil, err
		}
		n = newNode(0)
		d.doLocked(&diskOp{what: "names", node: dir, names: map[string]*inode{base: n}})
	}
	return &diskFile{disks: d, node: n, name: name}, nil
}

func (d *disks) rename(from, to string) error {
	if err := d.ask("rename " + from); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n, err := d.nodeLocked(from)
	if err != nil {
		return err
	}
	dir, was, _ := d.findLocked(from)
	_, is, _ := d.findLocked(to)
	d.doLocked(&diskOp{what: "names", node: dir, names: map[string]*inode{was: nil, is: n}})
	return nil
}

func (d *disks) remove(name string) error {
	if err := d.ask("remove " + name); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.nodeLocked(name); err != nil {
		return err
	}
	dir, base, _ := d.findLocked(name)
	d.doLocked(&diskOp{what: "names", node: dir, names: map[string]*inode{base: nil}})
	return nil
}

func (d *disks) removeAll(name string) error {
	if err := d.ask("remove " + name); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n, err := d.nodeLocked(name)
	if err != nil {
		return nil
	}
	for _, base := range slices.Sorted(maps.Keys(n.names)) {
		d.doLocked(&diskOp{what: "names", node: n, names: map[string]*inode{base: nil}})
	}
	dir, base, _ := d.findLocked(name)
	d.doLocked(&diskOp{what: "names", node: dir, names: map[string]*inode{base: nil}})
	return nil
}

func (d *disks) mkdir(name string) error {
	if err := d.ask("mkdir " + name); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.nodeLocked(name); err == nil {
		return fs.ErrExist
	}
	dir, base, err := d.findLocked(name)
	if err != nil {
		return err
	}
	d.doLocked(&diskOp{what: "names", node: dir, names: map[string]*inode{base: newDir()}})
	return nil
}

func (d *disks) syncDir(name string) error {
	d.mu.Lock()
	begun := len(d.ops)
	n, err := d.nodeLocked(name)
	d.mu.Unlock()
	if err == nil {
		err = d.ask("sync " + name)
	}
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.syncLocked(n, begun, true)
	return nil
}

// diskFile is an open file of the state disk.
type diskFile struct {
	disks  *disks
	node   *inode
	name   string
	closed atomic.Bool
}

// ask is disks.ask for what changes the file.
func (f *diskFile) ask(what string) error {
	if f.closed.Load() {
		return fs.ErrClosed
	}
	return f.disks.ask(what + " " + f.name)
}

func (f *diskFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.disks.askLook("read " + f.name); err != nil {
		return 0, err
	}
	f.disks.mu.Lock()
	defer f.disks.mu.Unlock()
	return f.disks.readLocked(f.node, p, off)
}

func (f *diskFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.ask("write"); err != nil {
		return 0, err
	}
	f.disks.mu.Lock()
	defer f.disks.mu.Unlock()
	f.disks.writeLocked(f.node, p, off)
	return len(p), nil
}

func (f *diskFile) Sync() error {
	begun := f.disks.length()
	if err := f.ask("sync"); err != nil {
		return err
	}
	f.disks.mu.Lock()
	defer f.disks.mu.Unlock()
	f.disks.syncLocked(f.node, begun, true)
	return nil
}

func (f *diskFile) Close() error {
	f.closed.Store(true)
	return nil
}

// diskOrigin is the origin on the disks.
type diskOrigin struct {
	*disks
	block bool // a block device: it has no times and attributes
	still bool // it always looks as if nobody had written to it
}

func (o diskOrigin) ReadAt(p []byte, off int64) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.readLocked(o.origin, p, off)
}

// stamp notes when the origin is changed, as every file system does.
func (o diskOrigin) stampLocked() {
	o.doLocked(&diskOp{what: "stamp", node: o.origin, changed: time.Now().UnixNano()})
}

func (o diskOrigin) WriteAt(p []byte, off int64) (int, error) {
	if f := o.pause.Load(); f != nil {
		(*f)()
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.stampLocked()
	o.writeLocked(o.origin, p, off)
	o.wrote.Add(int64(len(p)) / SectorSize)
	return len(p), nil
}

func (o diskOrigin) tryReadAt(p []byte, off int64) error {
	_, err := o.ReadAt(p, off)
	return err
}

func (o diskOrigin) tryWriteAt(p []byte, off int64) error {
	_, err := o.WriteAt(p, off)
	return err
}

func (o diskOrigin) sync(complete bool) error {
	begun := o.length()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.syncLocked(o.origin, begun, complete)
	return nil
}

func (o diskOrigin) zero(off, n int64, free bool) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.stampLocked()
	var list []placed
	for no := off / SectorSize; no < (off+n)/SectorSize; no++ {
		list = append(list, placed{no: no})
	}
	o.doLocked(&diskOp{what: "write", node: o.origin, sectors: list})
	return nil
}

func (o diskOrigin) next(off, end int64) (hole bool, to int64, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	isHole := func(off int64) bool {
		for no := off &^ (blockSize - 1) / SectorSize; no < (off|(blockSize-1)+1)/SectorSize; no++ {
			if o.origin.sectors[no] != nil {
				return false
			}
		}
		return true
	}
	if o.block {
		return false, end, nil
	}
	hole = isHole(off)
	for to = off; to < end && isHole(to) == hole; {
		to = min(end, to|(blockSize-1)+1)
	}
	return hole, to, nil
}

func (o diskOrigin) identify(fingerprint bool) (identity, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.still {
		return identity{dev: 1, ino: 1, size: o.origin.size, changed: 1}, nil
	}
	if !o.block {
		return identity{dev: 1, ino: 1, size: o.origin.size, changed: o.origin.changed}, nil
	}
	id := identity{dev: 1, size: o.origin.size, diskSeq: 1}
	if fingerprint {
		h, b := sha256.New(), make([]byte, SectorSize)
		const part = 1 << 20
		for _, no := range slices.Sorted(maps.Keys(o.origin.sectors)) {
			if off := no * SectorSize; off < part || off >= o.origin.size-part {
				h.Write(binary.LittleEndian.AppendUint64(b[:0], uint64(no)))
				h.Write(o.origin.sectors[no][:])
			}
		}
		h.Sum(id.print[:0])
	}
	return id, nil
}

func (o diskOrigin) written() (uint64, bool) {
	return uint64(o.wrote.Load()), o.block && o.counts.Load()
}

func (o diskOrigin) noteEnded(generation uuid.UUID) error {
	if o.block {
		return syscall.ENOTSUP
	}
	o.mu.Lock()
	o.stampLocked()
	o.doLocked(&diskOp{what: "attr", node: o.origin, attr: generation})
	o.mu.Unlock()
	return o.sync(true)
}

func (o diskOrigin) ended() (uuid.UUID, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.block || o.origin.attr == uuid.Nil {
		return uuid.Nil, syscall.ENODATA
	}
	return o.origin.attr, nil
}

func (o diskOrigin) willNeed(off, n int64) {}

func (o diskOrigin) size() (int64, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.origin.size, nil
}

func (o diskOrigin) truncate(size int64) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.stampLocked()
	o.doLocked(&diskOp{what: "size", node: o.origin, size: size})
	return nil
}

func (o diskOrigin) Close() error { return nil }
