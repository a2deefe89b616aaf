// Which files there are. docs/design.md has the same as a table for users.

package fusefs

import (
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// nanoseconds is RFC 3339 with all nine digits, so that text sorts as time does.
const nanoseconds = "2006-01-02T15:04:05.000000000Z07:00"

// root returns the directory that is mounted.
func (t *Tree) root() *dir {
	tr := traits{tree: t, kind: syscall.S_IFDIR, keep: always, born: time.Now()}
	return fixed(tr, nil,
		item{"devices", tr.kind, func() entry { return t.devices(tr) }},
		item{"snapshots", tr.kind, func() entry { return t.snapshots(tr) }},
		line(tr, "version", t.src.Version),
	)
}

// devices returns the directory of all devices.
func (t *Tree) devices(tr traits) *dir {
	d := &dir{node: node{traits: tr}}
	d.list = func() []fuse.DirEntry { return named(syscall.S_IFDIR, t.src.Devices()) }
	d.find = func(name string) entry {
		dev, ok := t.src.Device(name)
		if !ok {
			return nil
		}
		return t.device(dev)
	}
	return d
}

// device returns the directory of one device. All in it is live.
func (t *Tree) device(dev Device) *dir {
	tr := traits{tree: t, kind: syscall.S_IFDIR, live: true, born: time.Now()}
	return fixed(tr, dev,
		changes(tr, "cbt", dev.Tracking, dev.Changes),
		line(tr, "origin", dev.Origin),
		line(tr, "size", func() string { return decimal(dev.Size()) }),
		line(tr, "state", dev.State),
		line(tr, "uri", dev.URI),
	)
}

// changes returns an item for a directory of change tracking. Its files are as
// live as tr, the directory itself is its parent's for life.
func changes(tr traits, name string, tracking func() Tracking, changes func() Changes) item {
	return item{name, syscall.S_IFDIR, func() entry {
		return fixed(tr.as(syscall.S_IFDIR, always), nil,
			line(tr, "base", func() string { return decimal(tracking().Base()) }),
			line(tr, "block_size", func() string { return decimal(tracking().BlockSize()) }),
			line(tr, "generation", func() string { return tracking().Generation() }),
			mapItem(tr, tracking, changes),
			line(tr, "number", func() string { return decimal(tracking().Number()) }),
			since(tr, tracking, changes),
		)
	}}
}

// snapshot returns the directory of one snapshot. Its names are its own for
// life; only what the states say changes.
func (t *Tree) snapshot(snap Snapshot) *dir {
	tr := traits{tree: t, kind: syscall.S_IFDIR, born: snap.Created()}
	frozen := tr
	frozen.keep = always
	own := fixed(tr, snap,
		line(frozen, "created", func() string { return snap.Created().UTC().Format(nanoseconds) }),
		line(tr.state(), "state", snap.State),
	)
	d := &dir{node: node{traits: tr}, id: snap}
	d.list = func() []fuse.DirEntry {
		names := own.list()
		for _, device := range snap.Images() {
			image, ok := snap.Image(device)
			if !ok {
				continue
			}
			for _, it := range imageItems(frozen, device, image) {
				names = append(names, fuse.DirEntry{Name: it.name, Mode: it.kind})
			}
			names = append(names, increments(device, image)...)
		}
		return names
	}
	d.find = func(name string) entry {
		if e := own.find(name); e != nil {
			return e
		}
		// A device's name can have dots, and even end in .img: what stands
		// before the last dot is the device, and only that.
		device := name[:max(0, strings.LastIndexByte(name, '.'))]
		image, ok := snap.Image(device)
		if !ok {
			return increment(frozen, snap, name)
		}
		for _, it := range imageItems(frozen, device, image) {
			if it.name == name {
				return it.make()
			}
		}
		return nil
	}
	return d
}

// imageItems returns the items that one image adds to its snapshot's directory.
func imageItems(tr traits, device string, image Image) []item {
	tracking := func() Tracking { return image.Changes() }
	return []item{
		changes(tr, device+".cbt", tracking, image.Changes),
		imageItem(tr, device+".img", image),
		fullItem(tr, device, image),
		line(tr.state(), device+".state", image.State),
	}
}

// state returns the traits of the one file of a frozen directory that is live.
func (tr traits) state() traits {
	tr.live, tr.keep = true, 0
	return tr
}

// named returns a listing of names that are all of one kind.
func named(kind uint32, names []string) []fuse.DirEntry {
	var list []fuse.DirEntry
	for _, name := range names {
		list = append(list, fuse.DirEntry{Name: name, Mode: kind})
	}
	return list
}

// decimal returns n in decimal digits.
func decimal[T int64 | uint64](n T) string { return fmt.Sprint(n) }
