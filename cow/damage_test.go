package cow

import (
	"encoding/binary"
	"fmt"
	"maps"
	"strings"
	"testing"
)

// TestDamagedState starts, after a loss of power, on a state directory in which one byte
// of a file is another one, the file is cut short, or of another version: the origin is
// served, and either what is damaged did not matter, or a new generation says what is
// wrong, and that a full copy is due. Numbers go on as far as they can be read.
func TestDamagedState(t *testing.T) {
	l := newPowerLife(t)
	l.keep()
	l.take()
	l.put(0)
	l.must(l.checkpoint())
	l.put(4 << regionShift)
	l.take()
	l.must(l.dev.noteTear(&tear{number: 1, snapshot: "s"}))
	l.fact("torn", func(f *powerFacts) { f.torn, f.mayTear, f.generation = true, true, "" })
	generation := l.dev.Changes().Generation()
	for _, name := range []string{"map", "regions", "rollback"} {
		node := l.disks.root.names["state"].names["devices"].names["vda"].names[name]
		t.Run(name, func(t *testing.T) {
			for at := int64(0); at < node.size; at++ {
				if at == 2*regionsHeader && name == "regions" {
					at = regionsSets // nothing is between
				}
				if at > regionsSets+16 && at%8 != 0 {
					continue // no regions are there
				}
				l.damage(t, name, generation, fmt.Sprintf("byte %d changed", at), func(n *inode) { n.patch(at, n.byteAt(at)^0x11) })
			}
			for size := int64(0); size < node.size; size += 1 + node.size/64 {
				l.damage(t, name, generation, fmt.Sprintf("cut to %d bytes", size), func(n *inode) { n.resize(size) })
			}
			for _, v := range []uint32{0, 2, 1 << 31} {
				l.damage(t, name, generation, fmt.Sprintf("version %d", v), func(n *inode) {
					for k, b := range binary.LittleEndian.AppendUint32(nil, v) {
						n.patch(8+int64(k), b)
						if name == "regions" {
							n.patch(regionsHeader+8+int64(k), b)
						}
					}
				})
			}
		})
	}
}

// damage starts on a state in which one file is damaged by do.
func (l *powerLife) damage(t *testing.T, name, generation, what string, do func(*inode)) {
	t.Helper()
	next := &powerLife{
		t: t, rng: l.rng, disks: l.disks.afterCut(l.disks.length(), 1, l.rng),
		facts: l.facts.clone(), value: l.value, where: name + ", " + what,
	}
	next.disks.before = next.ask
	do(next.disks.root.names["state"].names["devices"].names["vda"].names[name])
	next.disks.boot()
	// A record that cannot be read has taken its numbers with it; the clock has not.
	next.facts.reserved = name != "regions"
	next.check()
	defer next.stop()
	if next.dev.Changes().Generation() == generation {
		return
	}
	why, _ := next.why.Load().(string)
	said := strings.Contains(why, ErrDamaged.Error()) || strings.Contains(why, ErrVersion.Error())
	if name == "rollback" || !said || !strings.HasSuffix(why, "a full copy is due") {
		t.Errorf("%s, %s: a new generation begins and says %q", name, what, why)
	}
	if version := strings.HasPrefix(what, "version"); version && !strings.Contains(why, ErrVersion.Error()) {
		t.Errorf("%s, %s: refused for another reason: %q", name, what, why)
	}
}

func (n *inode) byteAt(off int64) byte {
	if s := n.sectors[off/SectorSize]; s != nil {
		return s[off%SectorSize]
	}
	return 0
}

// patch changes one byte of a file, and of no other that shares its sectors.
func (n *inode) patch(off int64, b byte) {
	s := new(sector)
	if was := n.sectors[off/SectorSize]; was != nil {
		*s = *was
	}
	s[off%SectorSize] = b
	n.sectors = maps.Clone(n.sectors)
	n.sectors[off/SectorSize] = s
}
